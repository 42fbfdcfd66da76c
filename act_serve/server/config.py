"""What a server needs to know, from the command line or from the ``args`` of a Ray Serve config file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from act_serve.delta.composition import MAX_ABILITIES, Composition
from act_serve.engine.settings import DEFAULT_ABILITIES_PER_REQUEST, DEFAULT_RESIDENT_BYTES
from act_serve.errors import ProfileError, RequestError

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})")
_MAX_PORT = 65_535
LogFormat = Literal["plain", "json"]

_UNKNOWN = "extra_forbidden"  # pydantic's word
_ITSELF = "it is a setting of its own, of the same name"
_SET_HERE = "act-serve sets it itself, and abilities need the value that it sets"
_MAX_LORAS = "use the setting max_num_seqs; every sequence may have a composition of its own"
# What must not come in beside the settings, and what to use instead.
_OWNED = {
    **dict.fromkeys(("model", "served_model_name", "dtype", "max_model_len", "max_num_seqs"), _ITSELF),
    **dict.fromkeys(("enforce_eager", "tool_call_parser"), _ITSELF),
    "enable_auto_tool_choice": "use the setting tool_call_parser; empty is no tools",
    "additional_config": "use the settings store, max_resident_bytes and abilities_per_request",
    **dict.fromkeys(("middleware", "worker_cls", "enable_lora", "max_lora_rank"), _SET_HERE),
    **dict.fromkeys(("max_loras", "max_cpu_loras"), _MAX_LORAS),
    "otlp_traces_endpoint": "use the setting otlp_endpoint",
    "lora_modules": "put abilities into the store",
    "kv_cache_memory_bytes": "use the setting kv_cache_gib",
    "api_key": "use the setting keys; clients' keys end at the router",
    "config": "give the arguments one by one",
    **dict.fromkeys(("host", "port", "uds"), "use the setting engine_host; the port is any free one"),
}


def _from_json(value: object) -> object:
    """``serve run APP key=value`` gives every value as text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError('give vLLM\'s arguments by their Python names as a JSON object, such as {"seed": 1}')
    for name in parsed:
        instead = _OWNED.get(str(name).replace("-", "_"))
        if instead is not None:
            raise ValueError(f"{name!r} is not for engine_args: {instead}")
    return parsed


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _list_from_json(value: object) -> object:
    """As a list where it is text, which is how ``serve run`` gives it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError('give folders as a JSON list, such as ["/srv/abilities"]') from None


def _check_default(value: str) -> str:
    if value not in ("none", "auto"):
        try:
            Composition.parse(value)
        except RequestError as exc:
            raise ValueError(f"give none, auto or a composition such as fr+math*0.5: {exc}") from exc
    return value


def _check_address(value: str | None) -> str | None:
    if value is not None:
        match = _ADDRESS.fullmatch(value)
        if match is None or not 0 < int(match[2]) <= _MAX_PORT:
            raise ValueError(f"{value!r} is not HOST:PORT; give an address such as 127.0.0.1:8001, or [::1]:8001")
    return value


class ServerSettings(BaseModel):
    """Router and engines.

    Attributes:
        model: folder of the base checkpoint; None is the embedded SmolLM2-135M-Instruct.
        served_model_name: the name that clients use; by default the folder's name.
        store: folder of the ability store, or its URL, such as s3://bucket/prefix (docs/control-plane.md).
        default_abilities: what a request gets that asks for nothing: none, auto or a composition's text.
        allow_negative_weights: whether a request may subtract an ability.
        max_body_bytes: larger request bodies are refused with 413.
        max_ongoing_requests: requests that one engine replica works on or queues itself; None is two full batches,
            twice max_num_seqs.
        max_queued_requests: requests that one router holds back for a free engine, in turns by their abilities; beyond
            that, it refuses the newest of those that ask for the same abilities as most do, with 429.
        replica_wait_s: how long a request waits for a living engine before 503.
        catalogue_refresh_s: how often the router looks for changes in the store and in the keys file.
        keys: file of the API keys (docs/security.md); without one everybody may ask, and nobody may change anything.
        control_address: HOST:PORT for the routes that change what is served, which clients' own address then refuses;
            None: both have one address.
        log_format: of the line that each request writes to stderr: plain, or json for one object per line.
        otlp_endpoint: URL that takes spans of requests as OTLP over HTTP, such as http://collector:4318/v1/traces; the
            engines send theirs there, too. Needs the extra otel.
        metrics_need_key: whether /metrics is only for callers with a key, of any role.
        allowed_sources: folders that an admin may have abilities added from (docs/control-plane.md); uploads need none.
        max_ability_bytes: the most that an added ability may have, packed and unpacked.
        drain_s: how long the files of a removed version stay, for the requests that began with it.
        engine_replicas, router_replicas: processes of each kind.
        engine_max_replicas: Ray Serve adds engines up to this number by load, and takes them away again down to
            engine_replicas; None keeps the number as it is.
        target_ongoing_requests: requests that each engine should be working on, on average, where their number follows
            the load; None is max_num_seqs, one full batch, or half of max_ongoing_requests where that is less.
        look_back_s: over how long the load is averaged; more than the 10 s between Ray's looks at it.
        upscale_delay_s, downscale_delay_s: how long the load must ask for another number of engines.
        engine_surge_percent: engines that a change of the settings may start beyond the running ones, before it stops
            any, as a share of their number; there must be room for them. 0 stops an engine before its successor starts,
            so that a single one answers nothing meanwhile.
        engine_stop_s: how long an engine or a router that is taken away may finish what it has begun.
        engine_host: interface of the engines' HTTP servers, which only routers may call; by default the address by
            which Ray knows the node.
        engine_cpus, engine_gpus: what Ray sets aside for one engine replica.
        router_cpus: the same for a router; more than 0 keeps routers off a head node that has no CPUs to give.
        dtype, max_model_len, max_num_seqs, enforce_eager, kv_cache_gib: as in
            :class:`act_serve.engine.settings.EngineSettings`.
        tool_call_parser: vLLM's name of how the model writes tool calls (SmolLM2, Qwen: hermes); None or empty:
            no tools.
        max_resident_bytes: budget of the abilities that an engine holds in memory, in bytes.
        abilities_per_request: as in :class:`act_serve.engine.settings.EngineSettings`.
        engine_args: further vLLM engine arguments, by their Python names; none that the settings above decide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path | None = None
    served_model_name: str | None = None
    store: Annotated[str, BeforeValidator(_as_text), Field(repr=False)] = "abilities"
    default_abilities: Annotated[str, BeforeValidator(_check_default)] = "none"
    allow_negative_weights: bool = False
    max_body_bytes: PositiveInt = 10_000_000
    max_ongoing_requests: PositiveInt | None = None
    max_queued_requests: PositiveInt = 256
    replica_wait_s: PositiveFloat = 30.0
    catalogue_refresh_s: PositiveFloat = 1.0
    keys: Path | None = None
    control_address: Annotated[str | None, AfterValidator(_check_address)] = None
    metrics_need_key: bool = False
    log_format: LogFormat = "plain"
    otlp_endpoint: str | None = None
    allowed_sources: Annotated[tuple[Path, ...], BeforeValidator(_list_from_json)] = ()
    max_ability_bytes: PositiveInt = 2_000_000_000
    drain_s: PositiveFloat = 60.0
    engine_replicas: PositiveInt = 1
    engine_max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat | None = None
    look_back_s: Annotated[float, Field(gt=10)] = 30.0
    upscale_delay_s: PositiveFloat = 30.0
    downscale_delay_s: PositiveFloat = 600.0
    engine_surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    engine_stop_s: PositiveFloat = 20.0
    router_replicas: PositiveInt = 1
    router_cpus: Annotated[float, Field(ge=0)] = 0.0
    engine_host: str | None = None
    engine_cpus: Annotated[float, Field(ge=0)] = 1.0
    engine_gpus: Annotated[float, Field(ge=0)] = 0.0
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: PositiveInt = 2048
    max_num_seqs: PositiveInt = 16
    enforce_eager: bool = True
    kv_cache_gib: PositiveInt = 1
    max_resident_bytes: PositiveInt = DEFAULT_RESIDENT_BYTES
    abilities_per_request: Annotated[int, Field(ge=1, le=MAX_ABILITIES)] = DEFAULT_ABILITIES_PER_REQUEST
    tool_call_parser: str | None = "hermes"
    engine_args: Annotated[dict[str, Any], BeforeValidator(_from_json)] = {}

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.engine_max_replicas is not None and self.engine_max_replicas < self.engine_replicas:
            raise ValueError(
                f"engine_max_replicas={self.engine_max_replicas} is less than engine_replicas={self.engine_replicas}, "
                "the number to begin with; give at least as many"
            )
        target = self.target_ongoing_requests
        if target is not None and target >= self.ongoing_limit:
            raise ValueError(
                f"target_ongoing_requests={target:g} is never exceeded, because an engine takes "
                f"max_ongoing_requests={self.ongoing_limit} at most; give fewer"
            )
        return self

    @property
    def ongoing_limit(self) -> int:
        """Requests that one engine replica works on or queues itself."""
        return self.max_ongoing_requests or 2 * self.max_num_seqs


def read_settings(args: Mapping[str, Any]) -> ServerSettings:
    """Checks ``args``, values given as text included.

    Raises:
        ProfileError: a key is unknown or a value is wrong; the message names the first one.
    """
    try:
        return ServerSettings.model_validate(dict(args))
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = f"; known settings: {', '.join(ServerSettings.model_fields)}" if first["type"] == _UNKNOWN else ""
        subject = f"server setting '{where}'" if where else "server settings"
        raise ProfileError(f"{subject}: {first['msg'].removeprefix('Value error, ')}{known}") from exc
