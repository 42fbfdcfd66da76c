from __future__ import annotations

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from act_serve.errors import EngineError, ProfileError
from act_serve.server import ray_local
from act_serve.server.config import ServerSettings


def test_several_routers_need_a_cluster() -> None:
    with (
        pytest.raises(ProfileError, match="router_replicas > 1 needs a Ray cluster"),
        ray_local.local_application(ServerSettings(router_replicas=2), "127.0.0.1", 1, print),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ServerSettings(engine_cpus=64), "engine_cpus=64 for each of 1 engines is more than this machine's 2 CPUs"),
        (ServerSettings(engine_gpus=1), "engine_gpus=1 for each of 1 engines is more than this machine's 0 GPUs"),
        (ServerSettings(engine_replicas=3), "engine_cpus=1 for each of 3 engines"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: ServerSettings, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}))
    with pytest.raises(EngineError, match=message):
        ray_local._check_resources(settings)
    ray_local._check_resources(ServerSettings(engine_replicas=2))


def _status(message: str, status: str = "DEPLOYING") -> SimpleNamespace:
    engine = SimpleNamespace(status="UPDATING", message=message)
    application = SimpleNamespace(status=status, message="", deployments={"Engine": engine})
    return SimpleNamespace(applications={ray_local.APPLICATION: application})


def test_rays_reason_is_shown_and_then_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Deployment 'Engine' has 1 replicas that have taken more than 30s to be scheduled."
    serve = SimpleNamespace(status=lambda: _status(reason))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setattr(ray_local, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_local, "_UNPLACED_LIMIT_S", 0.1)
    said: list[str] = []
    with pytest.raises(EngineError, match="to be scheduled"):
        ray_local._wait_until_running(said.append)
    assert said[0] == f"waiting for Engine: {reason}"


@pytest.mark.parametrize("applications", [{}, _status("still busy").applications])
def test_no_wait_is_endless(monkeypatch: pytest.MonkeyPatch, applications: dict[str, object]) -> None:
    serve = SimpleNamespace(status=lambda: SimpleNamespace(applications=applications))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setattr(ray_local, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_local, "_START_LIMIT_S", 0.1)
    with pytest.raises(EngineError, match="after 0 s"):
        ray_local._wait_until_running([].append)


def test_an_address_that_does_not_answer_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_local, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_local, "_READY_LIMIT_S", 0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(EngineError, match="does not answer"):
            ray_local._wait_until_answering("127.0.0.1", probe.getsockname()[1])


def test_an_address_that_answers_is_found_on_every_interface() -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ray_local._wait_until_answering("0.0.0.0", server.server_port)
    finally:
        server.shutdown()
        server.server_close()


def test_modules_are_compiled_once_even_where_sources_stay_clean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # an imported module would be found first
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ACT_SERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert ray_local._bytecode() == {"PYTHONPYCACHEPREFIX": str(tmp_path / "home" / "bytecode")}
    assert ray_local._bytecode() == {}, "nothing is changed where bytecode may be written"
