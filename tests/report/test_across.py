"""What a study says across its settings: gates by structure, and slopes of loss against compute, by hand."""

from dataclasses import asdict, replace
from math import log10

import numpy as np
import pytest
from finished_arms import write_arm

from gated_attention.registry.variants import get_variant
from gated_attention.report.grid.page import write_study_report
from gated_attention.sizes import count_flops, get_size
from gated_attention.study.grid.rates import find_settings
from gated_attention.study.grid.run import find_points
from gated_attention.study.grid.scaling import find_scaling
from gated_attention.study.grid.structures import find_additions
from gated_attention.study.statistics import resamples

PLAIN = {"baseline": 2.5, "sdpa-headwise": 2.4, "sandwich-norm": 2.45, "sandwich-norm-sdpa-headwise": 2.44}
OTHER = {"baseline": 2.6, "sdpa-headwise": 2.45}
NOISE = (0.0, 0.001, -0.002)


def record(folder, name, seed, loss, *, size="tiny", train=None, qk_norm=True, **changes):
    variant, shape = get_variant(name), get_size(size)
    block = replace(variant.block, qk_norm=qk_norm)
    config = {
        "block": {**asdict(block), "gates": [gate.to_dict() for gate in block.gates]},
        "size": asdict(variant.resize(shape)),
        "train": {"steps": 100, "batch_size": 8, "learning_rate": 0.004, **(train or {})},
        "data": {"source": "text.jsonl", "tokenizer": "bytes", "block_size": 256},
        "model": {"vocab_size": 257},
    }
    write_arm(folder, name, seed, loss, config=config, **changes)


@pytest.fixture
def star(tmp_path):
    folder = tmp_path / "runs" / "star"
    for seed, noise in enumerate(NOISE):
        for name, loss in PLAIN.items():
            record(folder / "plain", name, seed, loss + noise * (1 + ("headwise" in name)))
        for name, loss in OTHER.items():
            record(folder / "qk-norm-false", name, seed, loss + noise, qk_norm=False)
            record(folder / "optimizer-muon", name, seed, loss - noise, train={"optimizer": "muon"})
    return folder


def settings_of(folder):
    return find_settings((result, []) for results in find_points(folder).values() for result in results)


def test_a_gate_is_compared_with_its_own_structure_and_that_gain_with_the_plain_one(star):
    found = {(one.setting.label, one.base.variant): one for one in find_additions(settings_of(star))}
    plain, norms = (found["optimizer adamw, QK-norm on", name] for name in ("baseline", "sandwich-norm"))
    assert plain.interaction is None
    assert plain.gain.mean == pytest.approx(-0.1 + np.mean(NOISE))
    assert norms.gated.variant == "sandwich-norm-sdpa-headwise"
    assert norms.gain.mean == pytest.approx(-0.01 + np.mean(NOISE))
    assert norms.interaction.mean == pytest.approx(0.09)  # the gate adds that much less
    other = found["optimizer muon, QK-norm on", "baseline"]
    differences = [(-0.15) - (-0.1 + noise) for noise in NOISE]
    assert other.interaction.mean == pytest.approx(np.mean(differences))
    assert other.interaction.standard_error == pytest.approx(np.std(differences, ddof=1) / 3**0.5)
    assert len(found) == 4


def test_the_page_says_whether_a_gate_adds_less(star, tmp_path):
    write_study_report(star, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## What a gate adds to each structure" in text
    row = next(line for line in text.splitlines() if "| sandwich-norm-sdpa-headwise |" in line and "adds" in line)
    assert "adds less" in row
    assert "not judged" not in text  # one rate tests no larger rate
    assert "7 claims are tested at 5 % each" in text  # four gains and three interactions
    assert "best rate is chosen" not in text
    assert "Loss against compute" not in text


def test_settings_without_a_centre_are_not_read_as_structures(tmp_path):
    folder = tmp_path / "runs" / "cross"
    for norm in (True, False):
        for name, loss in OTHER.items():
            record(folder / f"qk-norm-{norm}", name, 0, loss, qk_norm=norm)
    assert find_additions(settings_of(folder)) == []


def test_slopes_are_of_each_seed_and_paired(tmp_path):
    folder, flops = tmp_path / "runs" / "scale", {}
    bends = {"baseline": (-0.30, -0.31, -0.32), "sdpa-elementwise": (-0.34, -0.36, -0.35)}
    for size in ("xs", "s"):
        for steps in (100, 1000):
            for name, slopes in bends.items():
                variant, tokens = get_variant(name), steps * 2048
                shape = replace(variant.resize(get_size(size)), vocab_size=257)
                flops[name, size, steps] = count_flops(shape, 256, variant.block).total * tokens
                for seed, slope in enumerate(slopes):
                    loss = 4.0 + slope * log10(flops[name, size, steps] / 1e12)
                    point, train = folder / f"size-{size}_steps-{steps}", {"steps": steps}
                    record(point, name, seed, loss, size=size, train=train, tokens_seen=tokens)
    baseline, gated = find_scaling(settings_of(folder))
    assert (baseline.variant, gated.variant) == ("baseline", "sdpa-elementwise")
    assert sorted(gated.flops) == pytest.approx(sorted(v for key, v in flops.items() if key[0] == gated.variant))
    assert list(gated.slopes.values()) == pytest.approx(bends["sdpa-elementwise"])
    means = [np.mean(np.take(bends["baseline"], draw)) for draw in resamples(3)]
    assert baseline.interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert gated.minus(baseline).mean == pytest.approx(-0.04)
    write_study_report(folder, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Loss against compute" in text
    assert "-0.0400 ± 0.0058" in text


def test_draws_of_seeds_are_all_or_always_the_same():
    assert resamples(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert len(resamples(5)) == 3125
    assert resamples(6).shape == (10_000, 6)
    assert np.array_equal(resamples(6), resamples(6))
