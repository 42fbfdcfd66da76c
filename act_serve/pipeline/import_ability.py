"""Makes an ability of what others have trained: a fine-tuned checkpoint, or a PEFT adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from act_serve.abilities.store import Store
from act_serve.delta.fingerprint import fingerprint_model
from act_serve.delta.manifest import Import, Stored
from act_serve.models.families import channel_modules
from act_serve.models.loading import resolve_model
from act_serve.pipeline.import_adapter import CONFIG_FILE, adapter_change
from act_serve.pipeline.import_checkpoint import checkpoint_change
from act_serve.pipeline.import_rows import Given, keep_rows
from act_serve.pipeline.publish import channel_counts, publish_deltas


def import_ability(
    *, source: str, base: Path, store: Store, stored: Stored, p: float | None = None, **facts: Any
) -> tuple[Path, Import]:
    """Publishes the change that `source` makes to `base` as an ability; returns its folder and what was kept.

    `source` is a PEFT adapter's folder, or a model folder or hub id; `p` is the budget of `keep_rows`; `facts` are
    manifest fields such as name, kind and license. Raises ModelError when the source can't be read, PairMismatchError
    when it doesn't fit the base, DataError when nothing is left to keep, StoreError when the store can't be written.
    """
    with _change(source, base) as (given, more):
        deltas, said = keep_rows(given, channel_modules(base), stored, p)
    folder = publish_deltas(
        store=store,
        deltas=deltas,
        channels=channel_counts(base),
        stored=stored,
        base=base.name,
        base_fingerprint=fingerprint_model(base),
        imported=said,
        **more,
        **facts,
    )
    return folder, said


@contextmanager
def _change(source: str, base: Path) -> Iterator[tuple[Given, dict[str, Any]]]:
    """The change, and what the manifest says of its source."""
    adapter = Path(source).expanduser()
    if (adapter / CONFIG_FILE).exists():
        yield adapter_change(base, adapter), {"source": adapter.resolve().name}
        return
    folder = resolve_model(source)
    with checkpoint_change(base, folder) as given:
        named = Path(source).expanduser()
        label = named.resolve().name if named.exists() else source
        yield given, {"source": label, "source_fingerprint": fingerprint_model(folder)}
