"""The OpenAPI document: the router's own routes, and the engines' with the fields that choose abilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from act_serve.delta.composition import MAX_ABILITIES, MAX_VERSION, MAX_WEIGHT, NAME_PATTERN

# Those of the engines' endpoints whose bodies are JSON with a model, and what vLLM itself needs in them.
_INFERENCE = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/messages": "messages",
    "/v1/embeddings": "input",
}
_ERRORS = {
    "400": "the request is malformed",
    "401": "no key, or an unknown one",
    "403": "the key may not do this",
    "404": "no such ability, version, model or path",
    "409": "it exists already, or does not fit this base model",
    "413": "larger than this server takes",
    "422": "the ability's artifact is damaged",
    "429": "too many requests; the header retry-after says when to come again",
    "503": "no engine, or no store; try again",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Makes the app's ``openapi``, which builds the document when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    return openapi


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    made["paths"] |= {path: {"post": _inference(path, needed)} for path, needed in _INFERENCE.items()}
    components = made.setdefault("components", {})
    components.setdefault("schemas", {})["Error"] = _ERROR
    components.setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
    made["security"] = [{}, {"key": []}]
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"] |= _error_responses()
    return made


def _error_responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _ERRORS.items()}


def _inference(path: str, needed: str) -> dict[str, Any]:
    answers = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    body = {"type": "object", "properties": {**_fields(), needed: {}}, "required": [needed]}
    return {
        "summary": f"vLLM's {path}, with abilities",
        "description": "All further fields are vLLM's own. The answer, or the first event of a stream, has a field "
        "`act` that says which abilities were used.",
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "the engine's answer", "content": answers}},
    }


def _fields() -> dict[str, Any]:
    name = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
    weight = {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
    version = {"type": "integer", "minimum": 1, "maximum": MAX_VERSION}
    ability = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": name, "weight": weight, "scale": weight, "version": version},
    }
    listed = {"type": "array", "maxItems": MAX_ABILITIES, "items": {"anyOf": [name, ability]}}
    merged = {
        "type": "object",
        "required": ["ids"],
        "properties": {
            "ids": {"type": "array", "minItems": 1, "maxItems": MAX_ABILITIES, "items": name},
            "weights": {"type": "array", "maxItems": MAX_ABILITIES, "items": weight},
            "merge_strategy": {"enum": ["linear", None]},
        },
    }
    return {
        "model": {"type": "string", "description": "the base's name, or with a composition: BASE:fr+math*0.5"},
        "abilities": {"anyOf": [{"enum": ["auto", "none"]}, listed]},
        "merged_adapters": {**merged, "description": "as LoRAX has it"},
        "language": {"type": "string", "description": "a BCP 47 tag that an ability serves"},
        "skill": {"type": "string", "description": "the name of a skill"},
    }
