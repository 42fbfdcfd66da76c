"""Which of vLLM's paths clients may use, and under what label they are counted."""

from __future__ import annotations

import re

from act_serve.errors import RequestError

# vLLM's endpoints that serve clients. Those that steer the engine (sleep, weights, adapters, profiler) are not
# reachable through the router: https://docs.vllm.ai/en/latest/usage/security.html
_SERVED = ("/v1/", "/v2/", "/inference/v1/", "/cohere/v2/")
_SERVED_EXACTLY = frozenset(
    {"/tokenize", "/detokenize", "/tokenizer_info", "/pooling", "/classify", "/score", "/rerank", "/version"}
    | {"/generative_scoring", "/invocations", "/load"}
)
_STEERING = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_COUNTED = _SERVED_EXACTLY | {
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v1/responses",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
    "/inference/v1/generate",
    "/cohere/v2/chat",
}
_RESPONSE = re.compile(r"/v1/responses/[^/]+(/cancel)?")


class NoSuchPathError(RequestError):
    """The server has no such path."""

    http_status = 404


def check_path(path: str) -> None:
    """Refuses what is not for clients.

    Raises:
        NoSuchPathError: the path is unknown, steers the engine or is not in its plain form.
    """
    served = path.startswith(_SERVED) or path in _SERVED_EXACTLY
    if not served or path in _STEERING or ".." in path or "//" in path:
        raise NoSuchPathError(
            f"no path {path[:120]!r} on this server; it has vLLM's OpenAI endpoints, such as /v1/chat/completions and "
            "/v1/completions, and those that GET /docs lists"
        )


def path_label(path: str) -> str:
    """The path where it is a known one, its template where an id is in it, else "other": a bounded set of labels."""
    if path in _COUNTED:
        return path
    match = _RESPONSE.fullmatch(path)
    return f"/v1/responses/{{id}}{match[1] or ''}" if match else "other"
