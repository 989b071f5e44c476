"""A study of a mixture of experts and of gates under pressure: trains, resumes, records, reports."""

import json
from pathlib import Path

import pytest
import torch

from gated_attention.report.study.page import write_report
from gated_attention.study.plan import make_plan
from gated_attention.study.record import read_arrays
from gated_attention.study.run import run_study
from gated_attention.train.callbacks import Progress

CPU = torch.device("cpu")


class Watcher:
    """Stops a run at a step."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def say(self, message):
        pass

    def start(self, arm):
        pass

    def progress(self, arm, progress: Progress):
        if (arm.variant.name, progress.step) == self.stop_at:
            raise KeyboardInterrupt

    def finish(self, arm, result, kept):
        pass


def make(tmp_path, output, size="moe-tiny"):
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    words = [f"word{i % 17} is followed by number {i % 5}.\n" for i in range(400)]
    for i in range(8):
        (corpus / f"{i}.txt").write_text(f"file {i}\n" + "".join(words[i:]))
    train = {"steps": 6, "batch_size": 2, "accumulation": 2, "checkpoint_every": 2, "log_every": 1, "evaluate_every": 3}
    return make_plan(
        variants=("baseline", "sdpa-headwise-sparse"),
        size=size,
        seeds=1,
        output=tmp_path / output,
        device=CPU,
        data={"source": str(corpus), "block_size": 64, "max_validation_tokens": 1024},
        train=train,
    )


def run(plan, tmp_path, **watcher):
    return run_study(plan, CPU, tmp_path / "cache", Watcher(**watcher))


def metrics(plan, variant):
    path = plan.runs / variant / "seed0" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


@pytest.mark.trust
def test_mixture_of_experts_is_trained_resumed_and_recorded(tmp_path):
    whole, broken = make(tmp_path, "whole"), make(tmp_path, "broken")
    baseline, sparse = run(whole, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(broken, tmp_path, stop_at=("sdpa-headwise-sparse", 5))
    resumed = run(broken, tmp_path)[1]
    assert metrics(whole, "sdpa-headwise-sparse") == metrics(broken, "sdpa-headwise-sparse")
    for name, measure in sparse.measures.items():
        if name not in ("train_tokens_per_s", "peak_memory_gib"):
            assert resumed.measures[name] == measure, name

    (broken.runs / "baseline" / "seed0" / "result.json").unlink()  # as if killed before it was measured
    assert run(broken, tmp_path)[0].measures["val_loss_nats"] == baseline.measures["val_loss_nats"]

    assert baseline.config["train"]["auxiliary"] == {"load_balance": 0.01, "router_z": 0.001}
    assert sparse.config["train"] == baseline.config["train"]
    assert sparse.config["variant"]["gate_penalty"] == {"weight": 0.05, "target": None}
    assert sparse.config["model"]["experts_implementation"] == "grouped_mm"
    measures = sparse.measures
    assert 1 < measures["expert_load_max"].value == max(measures["expert_load_max"].per_layer) <= 4
    assert 0 <= measures["expert_load_min"].value < 1
    assert measures["dead_experts"].value == sum(measures["dead_experts"].per_layer)
    assert 0 < measures["gate_open_share"].value <= 1
    assert "gate_open_share" not in baseline.measures
    load = read_arrays(whole.runs / "sdpa-headwise-sparse" / "seed0" / "arrays.npz")["expert_load"]
    assert load.shape == (4, 16)
    assert load.max() == pytest.approx(measures["expert_load_max"].value)

    line = metrics(whole, "sdpa-headwise-sparse")[0]
    assert line["load_balance_loss"] > 1
    assert line["gate_penalty"] == pytest.approx(0.05 * line["gate_score_mean"])
    assert [len(layer) for layer in line["expert_load"]] == [16] * 4
    assert "gate_penalty" not in metrics(whole, "baseline")[0]

    write_report(whole.runs, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "16 experts, 4 per token" in page
    assert "**Expert load**: the busiest expert" in page
    assert "**Open gates**, the others exactly 0" in page
    assert "do not share one setting" not in page


def test_dense_studies_name_no_router(tmp_path):
    baseline, _ = run(make(tmp_path, "dense", size="tiny"), tmp_path)
    assert "auxiliary" not in baseline.config["train"]
    assert not any("expert" in name for name in baseline.measures)
    assert "load_balance_loss" not in metrics(make(tmp_path, "dense", size="tiny"), "baseline")[0]


def test_paper_sizes_follow_the_paper():
    plan = make_plan(variants=["baseline"], size="15a2b", seeds=1, output=Path(), device=CPU)
    train = plan.train
    assert train.sequences_per_step == 1024
    assert (train.steps, train.warmup_steps, train.learning_rate) == (100_000, 1000, 2e-3)
    assert train.min_learning_rate * train.learning_rate == pytest.approx(3e-5)
