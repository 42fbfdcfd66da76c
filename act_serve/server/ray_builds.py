"""Several builds at once on a Ray cluster: one per GPU, or one per share of the CPUs.

A build is one Ray task. When its process dies, Ray starts the task again, on another machine if need be, and the build
goes on after the last stage that it kept: so all machines must see the same folders.
"""

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from act_serve.abilities.location import absolute, is_url
from act_serve.delta.composition import Composition
from act_serve.errors import BuildError, EngineError, ProfileError
from act_serve.home import HOME_VARIABLE
from act_serve.profile.schema import Profile
from act_serve.server.ray_build_task import Board, Order, Outcome, run_order

RETRIES = 3
_POLL_S = 0.5
_DATA_VARIABLE = "ACT_SERVE_DATA"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where one build is: `attempt` counts its processes from 1 and is 0 while it waits for room."""

    stage: str = "waits for room on the cluster"
    attempt: int = 0
    pid: int = 0
    node: str = ""
    outcome: Outcome | None = None


Show = Callable[[Mapping[str, Progress]], None]


def build_on_ray(
    profiles: Sequence[Profile], *, store: str | Path, work: Path, address: str | None, show: Show
) -> list[Outcome]:
    """Builds all profiles and returns what became of each, in their order; one that fails stops no other.

    Args:
        profiles: of abilities with different names.
        store, work: folders that every machine of the cluster sees under the same path; the store may be a URL.
        address: of the cluster, or `local` for a Ray of this command's own; without one, `$RAY_ADDRESS`, a cluster that
            runs here, or `local`.
        show: told of all builds twice a second.

    Raises:
        ProfileError: two profiles have the same name, or one needs the latest version of what another one builds.
        BuildError: `store` or `work` can't be written.
        EngineError: there is no cluster at `address`.
    """
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise ProfileError(f"two profiles build the same ability: {', '.join(sorted(names))}")
    for profile in profiles:
        _refuse_waiting(profile, names)
    store, work = absolute(store), work.absolute()
    with _cluster(address), _mark([work] if is_url(store) else [Path(store), work]) as mark:
        board = Board.options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()  # type: ignore[attr-defined]
        options = _room(len(profiles))
        threads = int(options["num_cpus"])
        orders = [Order(each, store, work, mark, _environment(), Path.cwd(), threads) for each in profiles]
        task = ray.remote(run_order).options(max_retries=RETRIES, **options)
        return _collect({task.remote(order, board): order.profile.name for order in orders}, names, board, show)


def _refuse_waiting(profile: Profile, names: Sequence[str]) -> None:
    """All builds begin at once, so that which version is the latest would be a matter of luck."""
    named = (*profile.source.ability, *profile.finetune.company)
    needed = {each.name for text in named for each in Composition.parse(text).abilities if each.version is None}
    waits_for = sorted(needed & (set(names) - {profile.name}))
    if waits_for:
        raise ProfileError(
            f"{profile.name} goes on from, or in company of, {', '.join(waits_for)}, which is built at the same time; "
            f"name a version that is there already, such as {waits_for[0]}@1, or build one after the other"
        )


def _collect(waiting: dict[Any, str], names: Sequence[str], board: Any, show: Show) -> list[Outcome]:
    progress = {name: Progress() for name in names}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=_POLL_S)
        for name, (stage, attempt, pid, node) in ray.get(board.read.remote()).items():
            progress[name] = replace(progress[name], stage=stage, attempt=attempt, pid=pid, node=node)
        for task in done:
            name = waiting.pop(task)
            outcome = _outcome(task, name, progress[name])
            progress[name] = replace(progress[name], outcome=outcome)
        show(progress)
    return [each.outcome for name in names if (each := progress[name]).outcome is not None]


def _outcome(task: Any, name: str, progress: Progress) -> Outcome:
    try:
        found: Outcome = ray.get(task)
        return found
    except RayError as exc:
        said = str(exc).strip().splitlines()
        return Outcome(
            name=name,
            message=f"its process died {max(1, progress.attempt)} times, at last in {progress.stage!r} on "
            f"{progress.node or 'an unknown machine'}: {said[0] if said else type(exc).__name__}; finished stages are "
            "kept, and building it again goes on after them",
            exit_code=BuildError.exit_code,
        )


def _room(builds: int) -> dict[str, float]:
    """What each build asks for: a GPU where the cluster has any, and an equal share of the CPUs of one machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    at_once = max(1, min(builds, int(gpus)) if gpus else builds)
    share = int(sum(node.get("CPU", 0) for node in nodes)) // at_once
    room: dict[str, float] = {"num_cpus": max(1, min(share, largest))}
    return room | ({"num_gpus": 1} if gpus else {})


def _environment() -> dict[str, str]:
    return {name: value for name in (HOME_VARIABLE, _DATA_VARIABLE) if (value := os.environ.get(name))}


@contextmanager
def _mark(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """Leaves a file in each folder by which a worker sees that it looks at the same storage."""
    marks = [folder / f".shared-{uuid4().hex}" for folder in folders]
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        yield marks
    except OSError as exc:
        raise BuildError(f"the builds' folders can't be written: {exc}") from exc
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster, or starts a Ray of our own when none is named and none runs here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    handler = signal.getsignal(signal.SIGTERM)
    folder = _connect(address or os.environ.get("RAY_ADDRESS"))
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _connect(named: str | None) -> str | None:
    """Returns the temporary folder of the Ray that was started here, None when connected to one that is there."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if named != "local":
        try:
            _probe(named)
            ray.init(address=named or "auto", **quiet)
            return None
        except (OSError, ValueError, RuntimeError, RayError) as exc:
            if named:
                raise EngineError(f"no Ray cluster answers at {named} ({exc}); start one with `ray start`") from exc
    folder = tempfile.mkdtemp(prefix="act-serve-")
    ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)
    return folder


def _probe(named: str | None) -> None:
    """Raises OSError or ValueError when nobody listens at HOST:PORT; Ray itself would go on asking for minutes."""
    if named not in (None, "auto"):
        host, _, port = str(named).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
