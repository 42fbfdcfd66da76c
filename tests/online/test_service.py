"""The running server as operators and strangers meet it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from act_serve.abilities.store import Store
from act_serve.models.loading import embedded_base
from tests.abilities_for_tests import publish_random
from tests.online.conftest import BASE
from tests.online.server_process import COMMAND, ServerProcess
from tests.server.test_router import BAD_BODIES

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


# The others speak of the unit test's own store, limit and model.
_BAD = [case for case in BAD_BODIES if b"torn" not in case[0] and case[1] != 413 and b"gpt-4" not in case[0]]


@pytest.mark.parametrize(("body", "status", "message"), _BAD, ids=lambda value: str(value)[:40])
def test_bad_input(server: ServerProcess, body: bytes, status: int, message: str) -> None:
    reply = httpx.post(server.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


def test_a_body_of_20_megabytes(server: ServerProcess) -> None:
    reply = httpx.post(server.url + CHAT, content=b" " * 20_000_000, timeout=60)
    assert reply.status_code == 413
    assert "limit of 10000000 bytes" in reply.json()["error"]["message"]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_the_start_says_how_long_it_took(server: ServerProcess) -> None:
    assert re.search(r"^ready after \d+ s$", server.output(), re.MULTILINE), server.output()


def test_every_request_has_a_line_on_the_terminal(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "abilities": ["fr"]}
    httpx.post(server.url + CHAT, json=body, headers={"x-request-id": "seen-1"}, timeout=60).raise_for_status()
    wanted = re.compile(
        rf"^seen-1 POST {CHAT} 200 key=anyone composition=fr@\d+\*1 seconds=\S+ tokens=2$", re.MULTILINE
    )
    for _ in range(100):
        if wanted.search(server.output()):
            break
        time.sleep(0.1)
    assert wanted.search(server.output()), server.output()


def test_the_lines_of_the_welcome_can_be_pasted(server: ServerProcess) -> None:
    lines = [line.strip() for line in server.output().splitlines() if line.startswith("  curl ")]
    assert len(lines) == 2
    for line in lines:
        shown = subprocess.run(["sh", "-c", f"{line} --silent --fail"], capture_output=True, text=True, timeout=120)
        assert shown.returncode == 0, shown
        assert "fr" in str(json.loads(shown.stdout))


def test_the_client_of_the_readme(server: ServerProcess) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "http://127.0.0.1:8000/v1" in block
    program = block.replace("http://127.0.0.1:8000", server.url).replace("stream=True", "stream=True, max_tokens=24")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    act, _, text = shown.stdout.partition("\n")
    assert ast.literal_eval(act)["abilities"][0]["name"] == "fr"
    assert text.strip()


def test_health_readiness_and_metrics(server: ServerProcess, client: OpenAI) -> None:
    client.completions.create(model=BASE, prompt="a", max_tokens=1, extra_body={"abilities": ["fr"]})
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready", "replicas": 1, "alive": 1}
    page = httpx.get(f"{server.url}/metrics").text
    assert 'act_ability_requests_total{ability="fr"}' in page
    assert "vllm:generation_tokens_total{replica=" in page
    assert "act_resident_abilities{replica=" in page
    assert 'act_generated_tokens_total{ability="fr"}' in page


def test_every_answer_has_one_request_id(server: ServerProcess) -> None:
    for given in ({}, {"x-request-id": "a-1"}):
        (answered,) = httpx.get(f"{server.url}/v1/models", headers=given).headers.get_list("x-request-id")
        assert answered == given.get("x-request-id", answered)


def test_abilities_are_listed_and_shown(server: ServerProcess) -> None:
    rows = httpx.get(f"{server.url}/v1/abilities").json()["data"]
    assert {"fr", "math"} <= {row["name"] for row in rows}
    assert httpx.get(f"{server.url}/v1/abilities/fr").json()["manifest"]["languages"] == ["fr"]
    assert httpx.get(f"{server.url}/v1/abilities/frr").status_code == 404
    listed = subprocess.run([*COMMAND, "ability", "list", "--url", server.url], capture_output=True, text=True)
    assert listed.returncode == 0
    assert "fr" in listed.stdout


def test_a_new_version_is_served_without_a_restart(server: ServerProcess, store: Store) -> None:
    def ask(ability: Any) -> tuple[int, list[str], list[float]]:
        body = {"prompt": "Tell me about a river. " * 8, "max_tokens": 16, "temperature": 0, "logprobs": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "abilities": [ability]}, timeout=120).json()
        logprobs = answer["choices"][0]["logprobs"]
        return answer["act"]["abilities"][0]["version"], logprobs["tokens"], logprobs["token_logprobs"]

    first = ask("math")
    publish_random(store, embedded_base(), "math", seed=99, version=2, share=0.02, scale=0.01)
    deadline = time.monotonic() + 30
    while (second := ask("math"))[0] == 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    again = ask({"name": "math", "version": 1})
    assert (first[0], second[0], again[0]) == (1, 2, 1)
    assert again[1] == first[1]
    assert again[2] == pytest.approx(first[2], abs=0.05)
    same = [abs(a - b) for a, b in zip(first[2], second[2], strict=True) if first[1] == second[1]]
    assert first[1] != second[1] or max(same) > 0.2, "the new rows must show in what is served"


def test_a_client_that_leaves_ends_the_generation(server: ServerProcess) -> None:
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True, "abilities": ["fr"]}
    before = _generated_tokens(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        assert next(reply.iter_lines()).startswith("data: {")
    assert 0 < _settled(server) - before < 1000


def test_many_compositions_at_once(server: ServerProcess) -> None:
    def ask(number: int) -> tuple[dict[str, float], dict[str, float]]:
        wanted = {"fr": round(0.1 * (1 + number % 5), 3), "math": round(0.2 * (1 + number % 3), 3)}
        abilities = [{"name": name, "weight": weight} for name, weight in wanted.items()]
        body = {"prompt": f"{number}", "max_tokens": 8, "abilities": abilities}
        act = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()["act"]
        return wanted, {a["name"]: a["weight"] for a in act["abilities"]}

    with ThreadPoolExecutor(32) as pool:
        assert all(wanted == got for wanted, got in pool.map(ask, range(64)))


def test_a_second_server_on_the_port_says_so_at_once(server: ServerProcess) -> None:
    second = subprocess.run([*COMMAND, "serve", "--port", str(server.port)], capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{server.port}" in second.stderr
    assert "starting Ray" not in second.stderr


def _settled(server: ServerProcess) -> float:
    """The number of generated tokens, once it no longer grows."""
    last, now = -1.0, _generated_tokens(server)
    while now != last:
        time.sleep(1)
        last, now = now, _generated_tokens(server)
    return now


def _generated_tokens(server: ServerProcess) -> float:
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    lines = [line for line in page.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
