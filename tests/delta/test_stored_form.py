"""int8 rows come back within half a step, the same every time, and as what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from act_serve.delta.artifact import as_stored, read_artifact, serialize_modules, write_artifact
from act_serve.delta.manifest import TENSORS_FILE
from act_serve.delta.stored_form import dequantise, quantise
from act_serve.errors import ArtifactDamagedError
from tests.abilities_for_tests import manifest_for, random_modules
from tests.delta.test_artifact import MODULE, edit, rewrite


@pytest.fixture
def artifact(tiny_qwen: Path, tmp_path: Path) -> Path:
    modules = random_modules(tiny_qwen, seed=1, share=0.5)
    tensors = serialize_modules(modules, "int8")
    manifest = manifest_for(tiny_qwen, "small", 1, modules, tensors, "int8")
    return write_artifact(tmp_path / "small" / "1", manifest, tensors)


def test_is_read_back_as_it_was_measured(artifact: Path, tiny_qwen: Path) -> None:
    given = random_modules(tiny_qwen, seed=1, share=0.5)
    _, read = read_artifact(artifact)
    expected = as_stored(given, "int8")
    assert read.keys() == expected.keys() == given.keys()
    for name, module in expected.items():
        assert read[name].delta.dtype == torch.bfloat16
        assert torch.equal(read[name].delta, module.delta)
        assert torch.equal(read[name].rows, given[name].rows)
        assert (read[name].bias_delta is None) == (given[name].bias_delta is None)
    values = sum(module.delta.numel() for module in given.values())
    rows = sum(module.rows.numel() for module in given.values())
    saved = len(serialize_modules(given, "bfloat16")) - (artifact / TENSORS_FILE).stat().st_size
    assert values - 4 * rows - 100 * len(given) < saved < values


def test_error_is_half_a_step_and_the_second_rounding_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = 10 ** torch.linspace(-12, 6, 200)[:, None]
    delta = torch.randn(200, 96, generator=draw) * sizes
    delta[7] = 0
    levels, scale = quantise(delta)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) == 127
    # Half a step, and what bfloat16 takes from the row's largest values.
    assert bool(((levels * scale[:, None] - delta).abs() <= (0.5 + 127 * 2**-8) * scale[:, None]).all())
    assert bool((dequantise(levels, scale)[7] == 0).all())
    once = dequantise(levels, scale)
    again = quantise(once)
    assert torch.equal(again[0], levels)
    assert torch.equal(again[1], scale)


def test_bfloat16_stays_the_default(tiny_llama: Path) -> None:
    modules = random_modules(tiny_llama, seed=1)
    assert serialize_modules(modules) == serialize_modules(modules, "bfloat16")


DAMAGES = {
    "no scale": (lambda t: t.pop(f"{MODULE}.scale"), "scale is missing"),
    "scale of another length": (lambda t: t.update({f"{MODULE}.scale": torch.ones(3)}), "scale is missing or not"),
    "infinite scale": (lambda t: t[f"{MODULE}.scale"].fill_(float("inf")), "not finite and positive"),
    "zero scale": (lambda t: t[f"{MODULE}.scale"].zero_(), "not finite and positive"),
    "floating values": (lambda t: t.update({f"{MODULE}.delta": t[f"{MODULE}.delta"].float()}), "not int8"),
    "other shape": (lambda t: t.update({f"{MODULE}.delta": t[f"{MODULE}.delta"][:, 1:].clone()}), "delta is"),
    "overflow": (lambda t: t[f"{MODULE}.scale"].fill_(3e38), "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_its_own_message(name: str, artifact: Path) -> None:
    change, message = DAMAGES[name]
    rewrite(artifact, change)
    with pytest.raises(ArtifactDamagedError, match=message):
        read_artifact(artifact)


def test_a_form_that_the_manifest_does_not_say_is_refused(artifact: Path) -> None:
    edit(artifact, stored="bfloat16")
    with pytest.raises(ArtifactDamagedError, match=r"delta is torch\.int8"):
        read_artifact(artifact)


def test_not_a_number_is_never_written(tiny_llama: Path, tmp_path: Path) -> None:
    modules = random_modules(tiny_llama, seed=1)
    modules[MODULE].delta[0, 0] = float("nan")
    tensors = serialize_modules(modules, "int8")
    manifest = manifest_for(tiny_llama, "bad", 1, modules, tensors, "int8")
    with pytest.raises(ArtifactDamagedError, match="scale"):
        write_artifact(tmp_path / "bad" / "1", manifest, tensors)
