"""Requests made from the OpenAPI document, right ones and wrong ones, to the router over a real socket."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis import GenerationMode

from act_serve.server.openapi import _ERRORS
from tests.server.admin_server import ADMIN, CHAT, Server

_CASES_EACH = 220
_LEAST_CASES = 2000
# Everything but time: this machine may be slow, and what hypothesis shrinks to is printed with how to repeat it.
_SETTINGS = hypothesis.settings(
    max_examples=_CASES_EACH, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)


def test_the_document_has_every_route_and_the_fields_of_abilities(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/health", "/v1/models", "/v1/abilities/{name}/pin", CHAT, "/v1/completions"} <= paths.keys()
    fields = paths[CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"model", "abilities", "merged_adapters", "language", "skill", "messages"} == fields.keys()
    for operations in paths.values():
        assert all(operation["responses"].keys() >= _ERRORS.keys() for operation in operations.values())


@pytest.mark.slow
def test_no_request_of_the_document_breaks_the_router(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for version in (1, 2):
        assert server.upload("fr", version).status_code == 201
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        _try(server, found.ok(), statuses)
    print(f"{statuses.total()} requests: {dict(statuses)}")
    assert statuses.total() >= _LEAST_CASES
    assert statuses.keys() >= {200, 400, 404}, statuses
    assert not [record for record in caplog.records if "unforeseen" in record.message]
    assert server.client.get("/ready").json()["alive"] == 1


def _try(server: Server, operation: Any, statuses: Counter[int]) -> None:
    declared = {int(status) for status in operation.definition.raw["responses"]}
    path = operation.path
    headers = ADMIN if "abilit" in path or "lora" in path else {"authorization": "Bearer the user"}
    right, wrong = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

    @_SETTINGS
    @given(case=st.one_of(right, wrong), known=st.booleans())
    def answered(case: Any, known: bool) -> None:
        if known and "{name}" in path and operation.method.upper() != "DELETE":
            case.path_parameters["name"] = "fr"
        reply = case.call(base_url=str(server.client.base_url), headers=headers, timeout=60)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500 or reply.status_code in declared, f"{reply.status_code}: {reply.text[:500]}"

    answered()
