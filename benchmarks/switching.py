"""What another ability costs an engine: loaded beside its layers, or patched into its weights.

    python -m benchmarks.switching [--base FOLDER] [--dtype auto] [--repeats 9] [--json FILE]

One process holds vLLM's model of the base, its weights as loaded. In turn it loads an ability of 5 % of the rows beside
the layers, makes a new composition of resident abilities the step's, and writes the same ability into the weights with
vLLM's own sparse checkpoint patches (`act-serve export --to vllm-patch`). A patch changes the answers of all requests,
so that an engine has to drain before it, and takes another patch to undo; vLLM's CPU worker packs its weights and
cannot be patched at all once it runs. Medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.timing import milliseconds

REQUESTS, ABILITIES, SHARE = 16, 4, 0.05


def measure(base: Path, work: Path, repeats: int, dtype: str) -> dict[str, float]:
    """Medians over the repeats, in milliseconds.

    Args:
        work: an empty folder for the abilities and the patch.
        dtype: of the model; auto is what a server would take.
    """
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    from act_serve.abilities.store import Store
    from act_serve.delta.fingerprint import fingerprint_model
    from act_serve.engine.ability_key import AbilityKey
    from act_serve.engine.app import served_dtype
    from act_serve.engine.manager import AbilityManager
    from act_serve.engine.resolver import adapter_request
    from act_serve.engine.weight_patch import read_weight_patch
    from act_serve.pipeline.compose import artifacts_of, compose
    from act_serve.pipeline.export_patch import export_patch
    from tests.abilities_for_tests import pinned, publish_random
    from tests.vllm_models import load_vllm_model

    store = Store(work / "store")
    for number in range(ABILITIES):
        publish_random(store, base, f"a{number}", seed=number, share=SHARE)
    patch = export_patch(base=base, deltas=compose(artifacts_of("a0", store.root), base), folder=work / "patch")
    model = load_vllm_model(base, work / "meeting", served_dtype(dtype))
    patches = read_weight_patch(patch)
    manager = AbilityManager(fingerprint_model(base), store, 1 << 40)
    with torch.inference_mode():
        manager.create_lora_manager(model)
    key = AbilityKey.of(pinned(store, "a0").abilities[0])

    def load() -> None:
        while not manager.load([key]):
            time.sleep(0.0005)

    def switch(number: int) -> None:
        """The first step of a composition that was never seen before, on 16 requests that each decode a token."""
        text = "+".join(f"a{i}*{1 + number / 1000:g}" for i in range(ABILITIES))
        request = adapter_request("base", pinned(store, text), number, store)
        mapping = LoRAMapping((number,) * REQUESTS, (number,) * REQUESTS)
        times["switch"].append(milliseconds(lambda: manager.set_active_adapters({request}, mapping)))

    times: dict[str, list[float]] = {"load": [], "switch": [], "read_patch": [], "apply_patch": []}
    for _ in range(repeats):
        times["load"].append(milliseconds(load))
        times["read_patch"].append(milliseconds(lambda: read_weight_patch(patch)))
        times["apply_patch"].append(milliseconds(lambda: load_checkpoint_weight_patches(model, patches)))
        manager.evict(key)
    for number in range(repeats + 1):
        switch(number + 1)
    del times["switch"][0]  # it loads the abilities
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def main() -> None:
    """Measures, prints a line for each figure, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="checkpoint folder; default: the embedded model")
    parser.add_argument("--dtype", default="auto", help="as the server's")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from act_serve.models.loading import embedded_base

    with tempfile.TemporaryDirectory(prefix="act-serve-bench-") as work:
        found = measure(options.base or embedded_base(), Path(work), options.repeats, options.dtype)
    for name, value in found.items():
        print(f"{name:12} {value:9.3f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
