"""Layer by layer is chosen when it must be, said in the plan, and changes no ability."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from act_serve.delta.artifact import read_artifact
from act_serve.errors import BuildError, ProfileError
from act_serve.models.examples import Example
from act_serve.models.families import channel_modules
from act_serve.models.loading import computing_dtype, embedded_base, load_model
from act_serve.pipeline import memory_use as decision
from act_serve.pipeline import plan, plan_memory
from act_serve.pipeline.calibrate import score_channels
from act_serve.pipeline.localize import localize
from act_serve.pipeline.memory_use import memory_use, model_bytes
from act_serve.profile.load import load_profile
from act_serve.profile.schema import Localize, Ranking
from tests.pipeline.test_run import build, profile_file
from tests.tiny_models import make_llama, make_tokenizer, plant

TEXTS = [Example(f"question {number}", "the answer is " + "abcdefghij"[number] * number) for number in range(10)]
HIDDEN, INNER = 512, 1408
SHIPPED = Path(__file__).parents[2]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = make_llama(tmp_path / "base", layers=4)
    plant(base, tmp_path / "source", p=0.125, scale=0.3)
    return base, tmp_path / "source"


@pytest.mark.parametrize(
    "ranking", ["activation_global", "activation_per_module", "activation_relative", "activation_weight"]
)
def test_same_scores_and_same_channels(pair: tuple[Path, Path], ranking: Ranking) -> None:
    base, source = pair
    modules = channel_modules(base)
    whole = score_channels(ranking, base=base, source=source, examples=TEXTS, memory="together")
    layered = score_channels(ranking, base=base, source=source, examples=TEXTS, memory="layerwise")
    torch.testing.assert_close(layered, whole, rtol=1e-5, atol=1e-5)
    settings = Localize(ranking=ranking, p=0.125)
    chosen = localize(modules, layered, settings, seed=0), localize(modules, whole, settings, seed=0)
    torch.testing.assert_close(*chosen)


def test_auto_goes_by_free_memory(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = pair
    for free, layerwise in ((model_bytes(base), True), (3 * model_bytes(base), False), (None, False)):
        monkeypatch.setattr(decision, "free_bytes", lambda free=free: free)
        assert memory_use("activation_global", "auto", base).layerwise is layerwise
    monkeypatch.setattr(decision, "free_bytes", lambda: 1)
    assert not memory_use("weight_relative", "auto", base).layerwise
    assert not memory_use("gradient", "auto", base).layerwise
    assert not memory_use("activation_global", "together", base).layerwise


def test_build_layer_by_layer_says_so(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"p": 0.125, "calibration_items": 5, "ranking": "activation_per_module"}
    together, said = build(tmp_path, profile_file(tmp_path, localize=settings, finetune={"steps": 0}))
    assert "5 answers, both in memory" in said
    monkeypatch.setattr(decision, "free_bytes", lambda: 1)
    layered, said = build(tmp_path, profile_file(tmp_path, name="layered", localize=settings, finetune={"steps": 0}))
    assert "layer by layer: the pair needs" in " ".join(said.split())
    assert read_artifact(together)[0].tensors_sha256 == read_artifact(layered)[0].tensors_sha256


def test_a_plan_never_loads_what_does_not_fit(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rankings that read weights alone localize a pair of any size, and their plan must not be what needs the base."""
    profile = load_profile(profile_file(tmp_path, localize={"p": 0.125, "ranking": "weight_relative"}))
    loaded: list[Path] = []

    def load(folder: Path) -> object:
        loaded.append(folder)
        return load_model(folder)

    monkeypatch.setattr(plan, "load_model", load)
    assert plan.make_plan(profile, pair[0], TEXTS).stages
    assert loaded == [pair[0]]
    monkeypatch.setattr(decision, "free_bytes", lambda: 1)
    assert all(stage.seconds > 0 for stage in plan.make_plan(profile, pair[0], TEXTS).stages)
    assert loaded == [pair[0]]


def test_the_plan_s_memory_is_more_than_the_shipped_builds_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model that they were built from, in bfloat16 as most of them were."""
    base, found = embedded_base(), []
    for module in (plan_memory, decision):
        monkeypatch.setattr(module, "computing_dtype", lambda: torch.bfloat16)
    for name, version, profile in (("de", 2, "de-2"), ("extract", 3, "extract-3"), ("reason", 6, "reason-5")):
        settings = load_profile(SHIPPED / "profiles" / "abilities" / f"{profile}.yaml")
        took = json.loads((SHIPPED / "abilities" / name / str(version) / "evaluation.json").read_text())["peak_bytes"]
        tuning = plan_memory.tuning_rows(base, settings.finetune, settings.localize.p)
        found += [took["finetune"] / tuning, took["evaluate-base"] / plan_memory.evaluating(base)]
    assert 0.5 < min(found) < max(found) < 1, found


def test_gradient_needs_the_whole_model(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ProfileError, match="the ranking gradient needs the whole base model"):
        load_profile(profile_file(tmp_path, localize={"ranking": "gradient", "memory": "layerwise"}))
    with pytest.raises(BuildError, match="can't go layer by layer"):
        score_channels("gradient", base=pair[0], source=pair[1], examples=TEXTS, memory="layerwise")


# What a ranking holds at its peak, in a process of its own: VmHWM, file pages of the checkpoints included, and the
# largest RssAnon that a second thread saw every 2 ms.
PEAK = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from act_serve.models.examples import Example
from act_serve.pipeline.peak_memory import forget_peak, peak_bytes
from act_serve.pipeline.rankings.catalogue import RANKINGS
from act_serve.pipeline.rankings.score import Pair

def run(folder, layerwise):
    examples = tuple(Example(None, f"the answer is {number:03}" + "a" * letters) for number in range(count))
    RANKINGS[sys.argv[1]].score(Pair(folder, folder, examples, layerwise=layerwise))

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

warm, folder, layerwise = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "layerwise"
count, letters = int(sys.argv[5]), int(sys.argv[6])
run(warm, layerwise)
forget_peak()
before, seen, done = (peak_bytes(), anonymous()), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
run(folder, layerwise)
done.set()
watcher.join()
print(peak_bytes() - before[0], max(seen) - before[1])
"""


def make_deep(folder: Path, layers: int, width: int = 1) -> Path:
    """Writes a Llama of many layers, tensor by tensor; its sizes are so many times `HIDDEN` and `INNER`."""
    folder.mkdir()
    hidden, inner = width * HIDDEN, width * INNER
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=259,
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    shapes = {module.name: (module.out_features, module.in_features) for module in channel_modules(folder)}
    tensors = {f"{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(259, hidden).bfloat16()
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def peak(
    ranking: Ranking, warm: Path, folder: Path, memory: str, examples: int = 4, letters: int = 9
) -> tuple[int, int]:
    """Bytes that scoring `folder` took beyond scoring `warm`: in all, and without pages of files.

    What is freed goes back to the system at once: what glibc would keep of it differs by layers from run to run.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK, ranking, str(warm), str(folder), memory, str(examples), str(letters)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    resident, anonymous = done.stdout.split()
    return int(resident), int(anonymous)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ranking", ["activation_per_module", "activation_weight"])
def test_peak_memory_is_that_of_a_few_layers(tmp_path: Path, ranking: Ranking) -> None:
    """At most 2.5 layers' worth, of however many, beside what does not grow with the layers' size."""
    one, few, many = (make_deep(tmp_path / str(layers), layers) for layers in (1, 12, 48))
    layer = computing_dtype().itemsize * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    shallow, deep = peak(ranking, one, few, "layerwise"), peak(ranking, one, many, "layerwise")
    assert max(deep[0] - shallow[0], deep[1] - shallow[1]) < layer, (shallow, deep)
    wide = peak(ranking, one, make_deep(tmp_path / "wide", 3, width=3), "layerwise")
    assert (wide[0] - shallow[0]) / (9 * layer - layer) < 2.5, (shallow, wide)
    # Whole models of 12 layers show that the measure sees what it should.
    assert peak(ranking, one, few, "together")[0] > 9 * layer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    warm, folder = make_deep(tmp_path / "1", 1), make_deep(tmp_path / "3", 3)
    few, many = (peak("activation_weight", warm, folder, "layerwise", count, 250)[1] for count in (8, 200))
    states = 2 * 192 * 260 * HIDDEN * computing_dtype().itemsize  # of the further examples, in both models
    assert many - few < states / 4, (few, many, states)


def test_a_full_disk_is_said(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BuildError, match=r"need \d+ MiB in .*No space left on device.*TMPDIR"):
        score_channels("activation_global", base=pair[0], source=pair[1], examples=TEXTS, memory="layerwise")
