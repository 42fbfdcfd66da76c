"""Router and engines on a Ray of their own on this machine, which ends without a trace."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from act_serve.errors import EngineError, MissingExtraError, ProfileError
from act_serve.home import cache_home
from act_serve.server.config import ServerSettings
from act_serve.server.leftovers import (
    children,
    end_processes,
    orphaned_semaphores,
    remove_files,
    shared_memory_of,
)
from act_serve.server.request_log import shown_request_lines

APPLICATION = "act-serve"
_POLL_S = 0.5
_OBJECT_STORE_BYTES = 80 << 20  # nothing large goes through Ray here; the smallest it accepts is 75 MB
# Generous: a large checkpoint on a slow disk; what can never start is found before.
_START_LIMIT_S = 1800.0
_UNPLACED_LIMIT_S = 60.0
_READY_LIMIT_S = 60.0
# Ray's words, after half a minute, for a replica that no machine has room for (ray/serve/_private/deployment_state.py).
_UNPLACED_MARK = "to be scheduled"
_FAILED_MARKS = ("failed to start", "constructor", "Traceback")
# Runs beside the start of Ray: compiles and reads what the engine imports, converts the embedded model if need be.
_WARM_UP = (
    "import act_serve.engine.app\n"
    "from act_serve.server.model_source import model_folder\n"
    "if {embedded}: model_folder(None)\n"
)

Say = Callable[[str], None]


@contextmanager
def local_application(settings: ServerSettings, host: str, port: int, say: Say) -> Iterator[None]:
    """Runs the application until the context ends; inside, it is ready, and each request's line is on stderr.

    Args:
        settings: of the server.
        host, port: where clients connect.
        say: told what is going on, several times a second.

    Raises:
        ProfileError: the settings need a cluster.
        EngineError: the engine or the router does not start; the message ends with their own.
        MissingExtraError: Ray is not installed.
    """
    if settings.router_replicas > 1:
        raise ProfileError("router_replicas > 1 needs a Ray cluster with a proxy in front; see deploy/")
    since = time.time()
    folder = tempfile.mkdtemp(prefix="act-serve-")
    os.environ.update(_environment(folder, port))
    shown = ExitStack()
    try:
        shown.enter_context(shown_request_lines(Path(folder)))
        say("starting Ray, and loading vLLM beside it")
        warm_up = subprocess.Popen(
            [sys.executable, "-c", _WARM_UP.format(embedded=settings.model is None)], stderr=subprocess.DEVNULL
        )
        _start_ray(folder, host)
        _check_resources(settings)
        say("starting router and engine")
        _deploy(settings)
        _wait_until_running(say)
        _wait_until_answering(host, port)
        warm_up.wait()
        yield
    finally:
        started = children()
        mapped = shared_memory_of(started)
        _stop()
        shown.close()
        end_processes({*started, *children()})
        remove_files(mapped | orphaned_semaphores(since))
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: str, port: int) -> Mapping[str, str]:
    """What Ray and vLLM read when they are imported; the names are documented in ray/serve/_private/constants.py.

    With direct ingress the router's own HTTP server listens on the public port, so that no token passes through a
    proxy; on a cluster, RAY_SERVE_ENABLE_HA_PROXY=1 puts HAProxy in front of the routers instead.
    """
    return {
        **_bytecode(),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Ray keeps a dead replica's port from the next one for 150 s, for the sake of HAProxy; here it is the only one.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": folder,
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_home() / "torchinductor"),
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _bytecode() -> Mapping[str, str]:
    """Where compiled modules go when they may not lie beside their sources.

    The engine's processes import some thousand files each; compiling them every time costs more than all else.
    """
    spec = importlib.util.find_spec("vllm")
    if not os.environ.pop("PYTHONDONTWRITEBYTECODE", None) or spec is None or spec.origin is None:
        return {}
    if Path(importlib.util.cache_from_source(spec.origin)).exists():
        return {}
    return {"PYTHONPYCACHEPREFIX": str(cache_home() / "bytecode")}


def _start_ray(folder: str, host: str) -> None:
    try:
        import ray
        from ray import serve
    except ImportError as exc:
        raise MissingExtraError("ray", "serve") from exc
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # ours are the only words on the terminal
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=folder,
    )
    # Ray's own prints its stack and has the process killed three seconds later, in the middle of the clearing up.
    signal.signal(signal.SIGTERM, handler)
    # Clients do not use Ray's own proxy: it gets any free port.
    serve.start(http_options={"host": host, "port": _free_port()}, logging_config={"log_level": "ERROR"})


def _deploy(settings: ServerSettings) -> None:
    from ray import serve

    from act_serve.server.ray_app import app

    target = serve.RunTarget(target=app(settings.model_dump(mode="json")), name=APPLICATION)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _check_resources(settings: ServerSettings) -> None:
    """Ray itself would wait for ever for a machine that is large enough."""
    import ray

    there = ray.cluster_resources()
    for name, each in (("CPU", settings.engine_cpus), ("GPU", settings.engine_gpus)):
        if each * settings.engine_replicas > there.get(name, 0):
            raise EngineError(
                f"engine_{name.lower()}s={each:g} for each of {settings.engine_replicas} engines is more than this "
                f"machine's {there.get(name, 0):g} {name}s; set fewer"
            )


def _wait_until_running(say: Say) -> None:
    from ray import serve

    start = time.monotonic()
    while True:
        waited_s = time.monotonic() - start
        application = serve.status().applications.get(APPLICATION)
        if application is not None:
            if application.status == "RUNNING":
                return
            states = {name: deployment.status for name, deployment in application.deployments.items()}
            for name, deployment in application.deployments.items():
                unplaced = _UNPLACED_MARK in deployment.message and waited_s > _UNPLACED_LIMIT_S
                if unplaced or any(mark in deployment.message for mark in _FAILED_MARKS):
                    raise EngineError(f"the {name} does not start: {_last_words(deployment.message)}")
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise EngineError(f"the server does not start: {_last_words(application.message)}")
            waiting = [name for name, state in states.items() if state != "HEALTHY"] or ["Router"]
            notes = [d.message for d in application.deployments.values() if _UNPLACED_MARK in d.message]
            say(f"waiting for {' and '.join(sorted(waiting))}{''.join(f': {_last_words(note)}' for note in notes)}")
            if waited_s > _START_LIMIT_S:
                raise EngineError(f"no server after {waited_s:.0f} s: {states}; Ray's last words: {notes or 'none'}")
        elif waited_s > _START_LIMIT_S:
            raise EngineError(f"Ray knows nothing of the server after {waited_s:.0f} s")
        time.sleep(_POLL_S)


def _wait_until_answering(host: str, port: int) -> None:
    """The address that is about to be announced must be this server's."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}/ready"
    deadline = time.monotonic() + _READY_LIMIT_S
    while True:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=_READY_LIMIT_S):
                return
        except OSError as exc:  # a status that is not 200, too
            if time.monotonic() > deadline:
                raise EngineError(f"router and engine run, but {url} does not answer: {exc}") from exc
        time.sleep(_POLL_S)


def _last_words(message: str) -> str:
    """A traceback's last line says what happened; the rest is in Ray's logs."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "raise"))]
    return (errors or lines or ["no reason given"])[-1][:500]


def _stop() -> None:
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    from ray import serve

    with redirect_stderr(io.StringIO()):  # Ray reports the end of its own controller as a failure
        try:
            serve.shutdown()
        finally:
            ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
