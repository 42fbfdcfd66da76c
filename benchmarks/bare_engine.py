"""vLLM's app with the plugin on a port and nothing in front of it.

python -m benchmarks.bare_engine MODEL NAME STORE PORT [MAX_RESIDENT_BYTES]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


async def serve(model: Path, name: str, store: Path, port: int, max_resident_bytes: int) -> None:
    """Serves until the process is ended."""
    import uvicorn

    from act_serve.engine.app import engine_app
    from act_serve.engine.settings import DEFAULT_RESIDENT_BYTES, EngineSettings

    budget = max_resident_bytes or DEFAULT_RESIDENT_BYTES
    settings = EngineSettings(model=str(model), served_model_name=name, store=store, max_resident_bytes=budget)
    async with engine_app(settings) as app:
        config = uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off")
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    import uvloop

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # uvicorn ends at the signal and then raises it again, which must not end this process before its engine's.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    resident = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    uvloop.run(serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), resident))
