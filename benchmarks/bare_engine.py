"""vLLM's app with the plugin on a port and nothing in front: the other side of the router's benchmark."""

from __future__ import annotations

import os
import sys
from pathlib import Path


async def serve(model: Path, name: str, store: Path, port: int) -> None:
    """Serves until the process is ended."""
    import uvicorn

    from act_serve.engine.app import engine_app
    from act_serve.engine.settings import EngineSettings

    async with engine_app(EngineSettings(model=str(model), served_model_name=name, store=store)) as app:
        config = uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off")
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    import uvloop

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    uvloop.run(serve(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
