"""``act-serve top`` against a real router, whose engine has vLLM's own kind of metrics page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from act_serve.cli.metrics_page import MetricsPage, parse_metrics
from act_serve.cli.top import frame
from act_serve.server.app import build_app
from act_serve.server.config import ServerSettings
from act_serve.server.upstream import FixedUpstream, Replica
from tests.abilities.manifests import publish
from tests.server.admin_server import keys_file
from tests.server.fake_engine import serving

_PAGE = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\" {c}"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="base"} 7.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="base"} 1234.0
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0",model_name="base"} 56.0
"""


def top(*words: str, key: str = "") -> list[str]:
    program = "import sys; from act_serve.cli.main import main; sys.argv[0] = 'act-serve'; main()"
    return [sys.executable, "-c", program, "top", *words, *(["--key", key] if key else [])]


def run(*words: str, key: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "160", "ACT_SERVE_KEY": ""}
    return subprocess.run(top(*words, key=key), capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    async def answer(request: Request) -> Response:
        return PlainTextResponse(_PAGE) if request.url.path == "/metrics" else JSONResponse({"id": "x"})

    engine = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    folder = tmp_path_factory.mktemp("top")
    for name in ("fr", "math"):
        publish(folder / "store", name)
    keys = keys_file(folder, user={"roles": ["infer"]})
    with serving(engine) as behind:
        settings = ServerSettings(store=folder / "store", keys=keys, metrics_need_key=True)
        replica = Replica("act-serve#Engine#x1", behind, {})
        with serving(build_app(settings, "base", lambda: FixedUpstream(replica))) as address:
            for _ in range(3):
                ask(address)
            yield address


def ask(url: str) -> None:
    headers = {"authorization": "Bearer the user"}
    body: dict[str, Any] = {"abilities": ["fr"], "messages": []}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == 200


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_one_frame(url: str) -> None:
    done = run("--once", "--url", url, key="the user")
    assert (done.returncode, done.stderr) == (0, "")
    assert cells(done.stdout) == [
        ["0", "3", "–", "0", "0", "0", "0"],
        ["x1", "3", "7", "25%", "1234", "–", "56", "–"],
        ["fr", "1", "ready", "3", "–"],
        ["math", "1", "ready", "0", "–"],
    ]


def test_rates_are_those_between_two_readings() -> None:
    def reading(at_s: float, requests: int, tokens: int) -> MetricsPage:
        text = f"""act_requests_total{{path="/v1/completions",status="200"}} {requests}
act_requests_total{{path="/v1/completions",status="429"}} 2.0
act_requests_total{{path="other",status="503"}} 1.0
act_ability_requests_total{{ability="fr"}} {requests}
vllm:num_requests_running{{replica="a"}} 1.0
vllm:generation_tokens_total{{replica="a"}} {tokens}
vllm:num_requests_running{{replica="b"}} 0.0
vllm:generation_tokens_total{{replica="b"}} {1000 - tokens}
"""
        return parse_metrics(text, at_s)

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    ability = {"name": "fr", "version": 2, "status": "ready"}
    console.print(frame("u", reading(12.0, 30, 500), reading(10.0, 10, 0), [ability]))
    assert cells(console.export_text()) == [
        ["0", "33", "10.0", "2", "1", "0", "0"],
        ["a", "1", "0", "0%", "500", "250.0", "0", "0.0"],
        ["b", "0", "0", "0%", "500", "–", "0", "0.0"],
        ["fr", "2", "ready", "30", "10.0"],
    ]


def test_it_goes_on_until_it_is_interrupted(url: str, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    with seen.open("w") as file:
        words = top("--url", url, "--interval", "0.1", key="the user")
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "TERM": "xterm",
                                   "FORCE_COLOR": "1", "COLUMNS": "160"})  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while seen.read_text().count("router http") < 3:
            assert process.poll() is None, seen.read_text()
            assert time.monotonic() < deadline, seen.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, seen.read_text()
    finally:
        process.kill()
        process.wait()


def test_errors_are_one_line(url: str) -> None:
    for words, message in ((("--url", url), "--key"), (("--url", "http://127.0.0.1:9"), "is it the address")):
        done = run("--once", *words)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
