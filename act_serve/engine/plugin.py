"""Entry points for vLLM's plugin groups; with them plain ``vllm serve`` serves abilities."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from act_serve.engine.settings import BASE_ENV, STORE_ENV


def register() -> None:
    """Registers the ability resolver where ``ACT_SERVE_STORE`` names a store; otherwise does nothing.

    Group ``vllm.general_plugins``: vLLM calls this in every one of its processes, before anything else.
    ``ACT_SERVE_BASE`` holds the served model names, separated by commas, that may stand before the colon.
    """
    root = os.environ.get(STORE_ENV)
    if not root:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from act_serve.abilities.location import absolute
    from act_serve.abilities.store import open_store
    from act_serve.engine.resolver import AbilityResolver

    names = [name for name in os.environ.get(BASE_ENV, "").split(",") if name]
    LoRAResolverRegistry.register_resolver("act_serve", AbilityResolver(open_store(absolute(root)), names))


class AbilityEndpoints:
    """Makes names without a version follow the store: vLLM alone remembers what a name meant when it was first used.

    Group ``vllm.endpoint_plugins``, which vLLM loads only where ``VLLM_PLUGINS`` names it
    (vllm/plugins/endpoint_plugins/interface.py). It adds no routes.
    """

    name = "act_serve"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Adds nothing."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Puts a table that knows the store in the place of the app's table of adapters."""
        root = os.environ.get(STORE_ENV)
        if root and engine_client is not None:
            from act_serve.abilities.location import absolute
            from act_serve.abilities.store import open_store
            from act_serve.engine.log import share_log
            from act_serve.engine.resolver import CurrentAdapters

            share_log()
            store, tasks = open_store(absolute(root)), set[asyncio.Task[Any]]()

            def forget(request: Any) -> None:
                tasks.add(task := asyncio.create_task(engine_client.remove_lora(request.lora_int_id)))
                task.add_done_callback(tasks.discard)

            state.openai_serving_models.lora_requests = CurrentAdapters(store, forget)
