"""The page of a study of learning rates: its numbers by hand, its words by the rule, the committed records."""

from math import nan, sqrt
from pathlib import Path

import pytest
from finished_arms import write_arm

from gated_attention.report.grid.page import write_study_report
from gated_attention.study.grid.rates import find_settings
from gated_attention.study.grid.run import find_points
from gated_attention.study.record import find_results, write_json
from gated_attention.train.metrics import read_metrics

COMMITTED = Path(__file__).parent.parent.parent / "reports" / "learning-rates-s" / "records"
LOSSES = {  # by rate, variant and seed
    0.001: {"baseline": (2.5, 2.6, 2.5), "sdpa-headwise": (2.4, 2.5, 2.4)},
    0.004: {"baseline": (2.0, 2.1, 2.0), "sdpa-headwise": (1.9, 2.0, 1.9)},
    0.016: {"baseline": (2.4, 2.6, 2.4), "sdpa-headwise": (1.95, 2.06, 1.96)},
    0.064: {"baseline": (nan, 3.0, 9.0), "sdpa-headwise": (2.5, 2.6, 2.5)},
}


@pytest.fixture
def study(tmp_path):
    for rate, variants in LOSSES.items():
        for variant, losses in variants.items():
            for seed, loss in enumerate(losses):
                config = {"study_learning_rate": rate, "model": {"vocab_size": 257, "num_hidden_layers": 3}}
                write_arm(tmp_path / "runs" / "rates" / f"learning-rate-{rate:g}", variant, seed, loss, config=config)
    return tmp_path / "runs" / "rates"


def page_of(study):
    folder = study.parent.parent / "report"
    write_study_report(study, folder)
    return (folder / "report.md").read_text(), folder


def settings_of(folder):
    return find_settings(
        (result, read_metrics(point / result.variant / f"seed{result.seed}" / "metrics.jsonl"))
        for point, results in find_points(folder).items()
        for result in results
    )


def test_the_numbers_are_those_of_the_definitions(study):
    (setting,) = settings_of(study)
    baseline, gated = setting.curves
    assert (baseline.variant, baseline.best, gated.best, setting.high) == ("baseline", 0.004, 0.004, 0.016)
    assert baseline.cap == pytest.approx(5.549, abs=1e-3)  # log 257
    assert baseline.diverged == {(0.064, 0)}
    found = setting.claim(gated)
    rises = [(0.05, 0.4), (0.06, 0.5), (0.06, 0.4)]
    differences = [after - before for after, before in rises]
    mean = sum(differences) / 3
    error = sqrt(sum((one - mean) ** 2 for one in differences) / 2 / 3)
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(error)
    assert found.verdict == "better"
    cap = baseline.cap
    assert baseline.sensitivity(setting.common_rates) == pytest.approx(
        {
            0: (2.5 + 2.0 + 2.4 + cap) / 4 - 2.0,
            1: (2.6 + 2.1 + 2.6 + 3.0) / 4 - 2.1,
            2: (2.5 + 2.0 + 2.4 + cap) / 4 - 2.0,
        }
    )


def test_the_page_says_what_the_rule_says(study):
    text, folder = page_of(study)
    assert "**`sdpa-headwise`: confirmed.** From 0.004, the best rate of `baseline`, to 0.016" in text
    assert "its loss rises by 0.3767 ± 0.0318 nats less than that of `baseline` (n = 3, t = -11.8" in text
    assert "**Best learning rate**: `baseline` 0.004, `sdpa-headwise` 0.004." in text
    assert "**Divergences**: `baseline` 1, `sdpa-headwise` 0." in text
    assert "| 1 of 12 |" in text
    again = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    page_of(study)
    assert again == {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 25
    assert lines[0].startswith("variant,architecture,size,data,tokenizer,context,bos,packing,steps,batch_size")


def test_a_claim_that_fails_is_said_as_plainly(tmp_path):
    for rate, rise in ((0.004, 0.0), (0.016, 1.0)):
        for seed in range(3):
            config = {"study_learning_rate": rate}
            folder = tmp_path / "runs" / "rates" / f"learning-rate-{rate:g}"
            write_arm(folder, "baseline", seed, 2.0 + 0.5 * rise, config=config)
            write_arm(folder, "sdpa-headwise", seed, 2.0 + rise * (1 + 0.01 * seed), config=config)
            write_arm(folder, "sdpa-elementwise", seed, 2.0 + rise * (0.5 + 0.1 * (seed - 1)), config=config)
    text, _ = page_of(tmp_path / "runs" / "rates")
    assert "**`sdpa-headwise`: the opposite holds.**" in text
    assert "**`sdpa-elementwise`: not confirmed.**" in text
    assert "At the edge of what was tried: `baseline`" in text


def test_settings_apart_from_the_rate_have_curves_of_their_own(tmp_path):
    for norm in (True, False):
        for rate in (0.004, 0.016):
            config = {"study_learning_rate": rate, "block": {"qk_norm": norm}}
            folder = tmp_path / "runs" / "rates" / f"qk-norm-{norm}_learning-rate-{rate:g}"
            for variant in ("baseline", "sdpa-headwise"):
                write_arm(folder, variant, 0, 2.0 + rate + norm, config=config)
    unfinished = tmp_path / "runs" / "rates" / "qk-norm-True_learning-rate-0.004" / "baseline" / "seed1"
    unfinished.mkdir()
    write_json(unfinished / "config.json", {})
    text, _ = page_of(tmp_path / "runs" / "rates")
    assert "**`sdpa-headwise` (QK-norm off): not judged.**" in text
    assert "n = 1, no evidence" in text
    assert "Begun and not finished: baseline seed 1 at qk-norm-True_learning-rate-0.004." in text
    assert len([setting.label for setting in settings_of(tmp_path / "runs" / "rates")]) == 2


def test_the_committed_study_of_learning_rates_is_read_as_its_text_says():
    (setting,) = settings_of(COMMITTED)
    baseline, elementwise, headwise = setting.curves
    assert (baseline.best, setting.high) == (0.001, 0.004)
    assert sum(len(find_results(point)) for point in find_points(COMMITTED)) == 48
    for curve, mean, error, t in ((headwise, 0.163, 0.086, 1.9), (elementwise, -0.019, 0.015, -1.3)):
        found = setting.claim(curve)
        assert (round(found.mean, 3), round(found.standard_error, 3), round(found.t, 1)) == (mean, error, t)
        assert found.verdict == "within noise"
    assert not any(curve.diverged for curve in setting.curves)
    assert elementwise.best == 0.001  # not the one seed at 0.064
