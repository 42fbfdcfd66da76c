"""vLLM's worker, with abilities in the place of LoRA: ``--worker-cls act_serve.engine.worker.AbilityWorker``."""

from __future__ import annotations

import os
import types
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from act_serve import __version__
from act_serve.abilities.location import absolute
from act_serve.abilities.store import open_store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.engine.ability_key import AbilityKey
from act_serve.engine.graph_limits import GraphLimits
from act_serve.engine.manager import AbilityManager
from act_serve.engine.outside_graphs import StepsOutsideGraphs
from act_serve.engine.plan import Part
from act_serve.engine.settings import (
    DEFAULT_ABILITIES_PER_REQUEST,
    DEFAULT_RESIDENT_BYTES,
    RESIDENT_ENV,
    STORE_ENV,
)
from act_serve.errors import ActServeError, EngineError

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker as _Worker
elif current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

logger = init_logger("vllm.act_serve")


class AbilityWorker(_Worker):
    """The platform's worker; its model runner asks an :class:`AbilityManager` where it would ask vLLM's for LoRA."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the model's layers get their delta layers.

        Raises:
            EngineError: LoRA is not enabled, or a step's tokens would not all come to one forward pass.
        """
        check_whole_steps(self.vllm_config)
        compile_on_cpu(self.vllm_config.compilation_config)
        options = mark_compiled_model(self.vllm_config)
        most = int(options.get("abilities_per_request", DEFAULT_ABILITIES_PER_REQUEST))
        self.graph_limits = GraphLimits.of(self.vllm_config, most)
        store = options.get("store") or os.environ.get(STORE_ENV)
        budget = options.get("max_resident_bytes") or os.environ.get(RESIDENT_ENV)
        self.ability_manager = AbilityManager(
            fingerprint_model(checkpoint_folder(self.model_config.model, self.model_config.revision)),
            None if store is None else open_store(absolute(store)),
            int(budget or DEFAULT_RESIDENT_BYTES),
            gather_from_workers,
            self.graph_limits,
        )
        lora_config = self.vllm_config.lora_config

        # Both of vLLM's GPU model runners inherit this method (vllm/v1/worker/lora_model_runner_mixin.py), call it from
        # their load_model, and ask runner.lora_manager from then on.
        def load_lora_model(runner: Any, model: torch.nn.Module, vllm_config: Any, device: torch.device) -> Any:
            vllm_config.lora_config = lora_config
            runner.lora_manager = self.ability_manager
            return runner.lora_manager.create_lora_manager(model, vllm_config)

        self.model_runner.load_lora_model = types.MethodType(load_lora_model, self.model_runner)
        if self.model_config.is_moe:
            # Else vLLM takes the expert kernels that can do LoRA, which CPUs lack and GPUs have faster ones than
            # (vllm/model_executor/layers/fused_moe/oracle); abilities change no experts.
            self.vllm_config.lora_config = None
        try:
            loaded = super().load_model(*args, **kwargs)
        finally:
            self.vllm_config.lora_config = lora_config
        self.outside_graphs = StepsOutsideGraphs(self.model_runner, self.ability_manager.leave_graphs)
        if getattr(self.model_runner, "lora_manager", None) is not self.ability_manager:
            raise EngineError("this vLLM did not take the ability manager; start it with --enable-lora")
        if current_platform.is_cpu() and not self.use_v2_model_runner:
            if not get_pp_group().is_first_rank:
                self._make_stage_input()
            self._compile_twice()
        return loaded

    def determine_available_memory(self) -> int:
        """As vLLM's; what abilities may take of a GPU's memory is left to them, unless the KV cache's size is given."""
        available: int = super().determine_available_memory()
        if current_platform.is_cpu() or self.cache_config.kv_cache_memory_bytes:
            return available
        return available - self.ability_manager.max_resident_bytes

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's; outside CUDA graphs where an ability of the step changes what they do not hold."""
        if self.graph_limits is None:
            return super().execute_model(scheduler_output)
        with self.outside_graphs.during(scheduler_output):
            return super().execute_model(scheduler_output)

    def _compile_twice(self) -> None:
        """Has vLLM's warm-up, which compiles the model, compile it for steps without abilities too.

        GPUs hide an operator that has nothing to add behind what runs there, and graphs of such steps hold none.
        """
        warm_up = self.model_runner.warming_up_model

        def warm_up_without_rows() -> None:
            mark_compiled_model(self.vllm_config, "without rows")
            warm_up()
            mark_compiled_model(self.vllm_config)

        def warm_up_both() -> None:
            self.model_runner.warming_up_model = warm_up  # vLLM warms models without a KV cache up once more
            warm_up()
            if self.ability_manager.compiled_model is not None:
                self.ability_manager.compiled_model.compile_without_rows(warm_up_without_rows)

        self.model_runner.warming_up_model = warm_up_both

    def _make_stage_input(self) -> None:
        """Makes the buffer that a pipeline stage copies its input to; vLLM makes it in a warm-up, which CPUs skip."""
        runner = self.model_runner
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    def ability_modules(self) -> dict[str, tuple[int, int, bool]]:
        """The checkpoint modules that deltas may change, on any worker: ``(out_features, in_features, bias)``."""
        return {name: astuple(shape) for name, shape in self.ability_manager.modules.items()}

    def abilities_per_request(self) -> int | None:
        """The most abilities that one request may name; None where nothing but vLLM limits it."""
        return None if self.graph_limits is None else self.graph_limits.abilities_per_request

    def load_abilities(
        self, keys: list[tuple[str, int, str]], leaving: list[tuple[str, int, str]]
    ) -> tuple[bool, str, str, list[tuple[str, int, str]]]:
        """Loads abilities in a thread; one call starts that, and the first one that finds it done makes them resident.

        Args:
            keys: name, version and digest of each; ask again with the same ones until they are resident.
            leaving: abilities that leave the memory first, whatever named them.

        Returns:
            whether they are resident; else the name and message of the error that keeps them from it, if there is
            one; and all that is resident now. vLLM keeps only the text of what a worker raises.
        """
        manager, ready, error, message = self.ability_manager, False, "", ""
        try:
            for key in leaving:
                manager.evict(AbilityKey(*key))
            ready = manager.load([AbilityKey(*key) for key in keys])
        except ActServeError as exc:
            error, message = type(exc).__name__, str(exc)
        except Exception as exc:
            # Such as a full GPU: no reason to end the engine, or to raise on one worker of several.
            logger.exception("Loading abilities failed")
            names = ", ".join(f"{name}@{version}" for name, version, _ in keys)
            error, message = EngineError.__name__, f"{names} could not be loaded: {type(exc).__name__}: {exc}"
        return ready, error, message, [(key.name, key.version, key.digest) for key in manager.resident()]

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """As vLLM's, for servers that load no abilities themselves.

        Of several workers only the last one raises: vLLM stops reading their answers at the first error
        (``collective_rpc`` in vllm/v1/executor/multiproc_executor.py), and would take those that it has not read for
        answers to its next call.

        Raises:
            ActServeError: an ability can't be made resident, here or, where this is the last one, on another worker.
        """
        failed = None
        try:
            added = bool(super().add_lora(lora_request))
        except Exception as exc:
            if not isinstance(exc, ActServeError):
                logger.exception("Loading %s failed", lora_request.lora_name)
            failed, added = exc, False
        workers = get_world_group()
        if workers.world_size == 1:
            if failed is not None:
                raise failed
            return added
        everyone: list[Any] = [None] * workers.world_size
        kind = "" if isinstance(failed, ActServeError) else f"{type(failed).__name__}: "
        said = None if failed is None else f"{kind}{failed}"
        torch.distributed.all_gather_object(everyone, said, group=workers.cpu_group)
        messages = [message for message in everyone if message is not None]
        if messages and workers.is_last_rank:
            raise EngineError(messages[0])
        return added


def check_whole_steps(config: VllmConfig) -> None:
    """Refuses what has a layer see a part of the step's tokens: every token is known by its number in the whole step.

    Data parallelism is refused beside it, as vLLM tells only one of its engines which abilities to load.

    Raises:
        EngineError: microbatches, prefill context parallelism, fast prefill or data parallelism are on.
    """
    if config.parallel_config.use_ubatching:
        raise EngineError("abilities do not run with microbatches; leave --enable-dbo and --ubatch-size out")
    if config.parallel_config.prefill_context_parallel_size > 1:
        raise EngineError("abilities do not run with prefill context parallelism; set its size to 1")
    if config.cache_config.kv_sharing_fast_prefill:
        raise EngineError("abilities do not run with fast prefill; leave --kv-sharing-fast-prefill out")
    if config.parallel_config.data_parallel_size > 1:
        raise EngineError(
            "abilities do not run with vLLM's data parallelism; leave --data-parallel-size out and start several "
            "engines (engine_replicas)"
        )


def mark_compiled_model(config: VllmConfig, form: str = "with rows") -> dict[str, Any]:
    """act-serve's part of vLLM's ``additional_config``, with a mark that compiled models are kept under.

    vLLM keeps compiled models from one start to the next, by a hash of its settings and of the model's code
    (vllm/compilation/decorators.py). Neither says which worker compiled it, and a model that was compiled with vLLM's
    own LoRA layers, by another version of this package or in another ``form``, lacks what is added here.
    ``additional_config`` is part of the hash (``VllmConfig.compute_hash``).
    """
    options: dict[str, Any] = (config.additional_config or {}).get("act_serve", {})
    marked = {**options, "compiled_with": f"act-serve {__version__}, {form}"}
    config.additional_config = {**(config.additional_config or {}), "act_serve": marked}
    return options


def compile_on_cpu(config: CompilationConfig) -> None:
    """Compiles the model where vLLM would have done so without LoRA.

    On CPUs vLLM turns compilation off for LoRA as the last thing (vllm/platforms/cpu.py), after it has left norms,
    activations and rotary embeddings to the compiler: ``custom_ops`` has "none". They would run as one torch call
    after the other, slower than both the compiled model and the eager one, which has vLLM's own operators.
    """
    if current_platform.is_cpu() and config.mode == CompilationMode.NONE and "none" in config.custom_ops:
        config.mode = CompilationMode.DYNAMO_TRACE_ONCE


def checkpoint_folder(model: str, revision: str | None = None) -> Path:
    """Local folder of a checkpoint: the path itself, or the hub's snapshot that vLLM has downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def gather_from_workers(mine: list[Part]) -> list[list[Part]]:
    """The modules' parts on every worker of every pipeline stage; all workers must call this."""
    everyone = [mine]
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            gathered: list[list[list[Part]]] = [[]] * group.world_size
            torch.distributed.all_gather_object(gathered, everyone, group=group.cpu_group)
            everyone = [parts for workers in gathered for parts in workers]
    return everyone
