"""The text of a request that automatic choice goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_CHARS = 1000
_TAIL = 300


def prompt_text(body: Mapping[str, Any]) -> str:
    """The first user message that has text, the prompt, or the input, at most 1,000 characters.

    The first, so that a conversation keeps its choice: each request brings the same beginning. System prompts, tool
    definitions and tool results are nobody's words. Of a long text, its head and its tail: instructions stand there.
    Understands the bodies of chat completions, completions, responses and messages; anything else is "".
    """
    turns = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(turns, str):
        return _ends(turns)
    for turn in turns if isinstance(turns, list) else ():
        text = turn if isinstance(turn, str) else _user_text(turn)
        if text.strip():
            return _ends(text)
    return ""


def _user_text(turn: object) -> str:
    if not isinstance(turn, dict) or turn.get("role", "user") != "user":
        return ""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _ends(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[: MAX_CHARS - _TAIL - 1]}\n{text[-_TAIL:]}"
