"""The limits that the engine's benchmark prints, against numbers made by hand, and what it makes of its rounds."""

from pathlib import Path

import pytest

from benchmarks.engine_throughput import (
    AGAINST_LORA,
    COMPILED_AGAINST_LORA,
    OF_LIMIT,
    against_floors,
    below_floor,
    limits,
    summarize,
)
from tests.tiny_models import make_llama


def test_limits_are_those_of_bytes_and_in_prompts_of_multiplications(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    quarter = (base / "model.safetensors").stat().st_size // 4
    found = limits(base, {f"a{number}": quarter for number in range(8)})
    wanted = {"idle": 1.0, "one": 1 / 1.25, "four_mixed": 1 / 2, "compose_3_of_8": 1 / 3}
    for case, limit in wanted.items():
        assert found[case] == found[f"compiled_{case}"] == pytest.approx(limit, rel=1e-3)
    # Two layers of hidden size 32, inner size 64, 4 heads of 8, 2 of keys and values: q, o, k, v, and three of the MLP.
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    attention = 2 * 4 * 8 * 512  # queries and scores, each with half of the 512 tokens of a prompt
    assert found["prefill_four"] == pytest.approx((linear + attention) / (1.05 * linear + attention))


def test_ratios_are_medians_over_rounds_of_what_ran_in_the_same_round() -> None:
    results = {
        "base": [100.0, 200.0, 50.0],
        "idle": [99.0, 150.0, 50.0],
        "four_mixed": [70.0, 160.0, 45.0],
        "compose_3_of_8": [60.0, 100.0, 35.0],
        "compiled_base": [200.0, 400.0, 100.0],
        "compiled_four_mixed": [150.0, 300.0, 80.0],
        "stock_lora": [5.0],
    }
    cases = summarize(results, {"compose_3_of_8": 0.75})
    assert cases["idle"] == {"tok_s": 99.0, "ratio": 0.99}
    assert cases["compose_3_of_8"] == {"tok_s": 60.0, "ratio": 0.6, "limit": 0.75, "of_limit": 0.8}
    assert cases["compiled_four_mixed"]["ratio"] == 0.75, "against the compiled base"
    found = against_floors(cases)
    assert found[OF_LIMIT] == pytest.approx(0.8)
    assert found[AGAINST_LORA] == pytest.approx(0.8 / 0.05)
    assert found[COMPILED_AGAINST_LORA] == pytest.approx(150 / 5)
    assert below_floor(cases) == []
    slow = summarize({**results, "idle": [80.0, 160.0, 40.0]}, {"compose_3_of_8": 0.9})
    assert [said.split(" (")[0] for said in below_floor(slow)] == ["idle 0.800", f"{OF_LIMIT} 0.667"]
