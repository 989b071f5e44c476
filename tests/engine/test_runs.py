"""`train` from its file to its record: stopped, killed and damaged on the way, on one process and on two."""

import json
import os
import signal
import time
from random import Random

import numpy as np
import pytest
import torch
from engine_processes import finish
from run_files import kill, start, write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gated_attention.analysis import inspect_model
from gated_attention.engine.run.run_file import read_run
from gated_attention.engine.whole import last_whole
from gated_attention.report.study.page import write_report
from gated_attention.train.metrics import read_metrics

ARM = "runs/small/sdpa-headwise/seed0"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(file):
    """The folder of a run that nothing interrupted, and what it printed."""
    printed = finish(start(file, file.parent / "whole", 2))
    return file.parent / "whole" / ARM, printed


def losses(folder):
    return {line["step"]: line["loss_nats"] for line in read_metrics(folder / "metrics.jsonl") if "loss_nats" in line}


def held_out(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["val_loss_nats"] for line in lines if "val_loss_nats" in line}


def probed(folder):
    lines = read_metrics(folder / "probe.jsonl")
    return {(line["step"], name): values for line in lines for name, values in line.items() if name != "step"}


def assert_probed_alike(found, expected):
    found, expected = probed(found), probed(expected)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-3), key


def assert_same_run(found, expected, steps):
    """The same weights to the bit, the same losses at the same steps, each once."""
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert losses(found) == losses(expected)
    assert held_out(found) == held_out(expected)
    assert probed(found) == probed(expected)
    assert list(losses(found)) == list(range(1, steps + 1))
    assert len(read_metrics(found / "metrics.jsonl")) == steps + steps // 10


def test_a_run_learns_and_leaves_what_the_docs_say(whole, tmp_path):
    folder, printed = whole
    found = losses(folder)
    assert list(found) == list(range(1, 21))
    assert found[20] < found[1] - 1.5
    assert list(held_out(folder)) == [10, 20]
    assert "step 20/20  loss " in printed
    assert " tokens/s  " in printed
    assert "Traceback" not in printed
    assert "Setting env" not in printed
    assert sorted(path.name for path in folder.iterdir() if path.name != "work") == [
        "config.json", "engine.log", "metrics.jsonl", "model", "probe.jsonl", "result.json", "run.toml", "step16",
        "step20",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = torch.tensor([tokenizer.encode("alpha beta gamma delta alpha beta gamma")])
    with torch.no_grad():
        assert model(text, labels=text).loss < 3.0
    write_report(folder.parents[1], tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert f"validation loss in nats/token: {held_out(folder)[20]:.4f}" in page
    assert "gated-attention train runs/small/sdpa-headwise/seed0/run.toml" in page


def test_the_held_out_loss_is_that_of_the_exported_model(whole, file):
    folder, _ = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    [part] = file.parent.glob("cache/gated_attention/raw/*")
    rows = np.fromfile(part / "validation.npy", "<u2").reshape(-1, 32).astype("int64")
    ids = torch.from_numpy(rows[np.arange(15) * len(rows) // 15])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert held_out(folder)[20] == pytest.approx(expected, abs=1e-5)
    inspection = inspect_model(model, [ids])
    for name in ("f_attn", "m_act"):
        assert probed(folder)[20, name] == pytest.approx(inspection.by_layer(name), rel=1e-4), name
    means = inspection.gates["sdpa"].by_layer("gate_mean")
    assert probed(folder)[20, "gate_mean_sdpa"] == pytest.approx(means, rel=1e-4)


def test_the_resolved_file_starts_the_identical_run_also_on_one_process(whole, tmp_path):
    folder, _ = whole
    again = read_run(folder / "run.toml", on_gpu=False)
    assert again.file.parallel.gpus == 2
    finish(start(folder / "run.toml", tmp_path, 1))
    assert losses(tmp_path / ARM) == pytest.approx(losses(folder), abs=1e-4)
    assert held_out(tmp_path / ARM) == pytest.approx(held_out(folder), abs=1e-4)
    assert_probed_alike(tmp_path / ARM, folder)


@pytest.mark.parametrize(
    ("processes", "layout"), [(4, ["parallel.replicas=2", "parallel.tensor=2"]), (2, ["parallel.context=2"])]
)
def test_the_layouts_of_the_file_have_the_same_losses(whole, file, tmp_path, processes, layout):
    printed = finish(start(file, tmp_path, processes, "checkpoints.every=20", *layout))
    assert "Warning" not in printed
    assert losses(tmp_path / ARM) == pytest.approx(losses(whole[0]), abs=1e-4)
    assert held_out(tmp_path / ARM) == pytest.approx(held_out(whole[0]), abs=1e-4)
    assert_probed_alike(tmp_path / ARM, whole[0])


def test_experts_train_alike_on_one_and_two_processes_and_their_model_loads(file, tmp_path):
    experts = ("model.num_experts=8", "model.num_experts_per_tok=2", "auxiliary.load_balance=0.5", "schedule.steps=10")
    recomputed = "precision.recompute=full"
    finish(start(file, tmp_path / "two", 2, *experts))
    finish(start(file, tmp_path / "one", 1, *experts, "batch.micro=2", recomputed))  # in four passes
    one, two = (tmp_path / name / ARM for name in ("one", "two"))
    assert losses(one) == pytest.approx(losses(two), abs=1e-4)
    assert held_out(one) == pytest.approx(held_out(two), abs=1e-4)
    for name in ("load_balance_loss", "router_z_loss", "expert_load_max"):
        first, second = ([line.get(name) for line in read_metrics(folder / "metrics.jsonl")] for folder in (one, two))
        assert first == pytest.approx(second, abs=1e-2 if name == "expert_load_max" else 1e-4)
    model = AutoModelForCausalLM.from_pretrained(two / "model")
    assert type(model).__name__ == "GatedQwen3MoeForCausalLM"
    assert json.loads((two / "config.json").read_text())["config"]["train"]["auxiliary"]["load_balance"] == 0.5


def killed_and_resumed(file, output, kills, *changes):
    """Kill a run so many times, each soon after another checkpoint, then let it end."""
    random, folder = Random(0), output / ARM
    for _ in range(kills):
        before, started = last_whole(folder), start(file, output, 2, *changes)
        while last_whole(folder) == before:
            assert all(process.is_alive() for process in started), started[0].printed.read_text()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))  # within a step, or within the next checkpoint
        assert kill(started), "the run was over before it was killed"
    return finish(start(file, output, 2, *changes))


def test_a_run_that_is_killed_twice_ends_in_the_same_weights(whole, file, tmp_path):
    printed = killed_and_resumed(file, tmp_path, 2)
    assert "from step 0 of" not in printed
    assert_same_run(tmp_path / ARM, whole[0], steps=20)


@pytest.mark.trust
def test_a_run_that_is_killed_ten_times_ends_in_the_same_weights(file, tmp_path):
    longer = "schedule.steps=80"
    finish(start(file, tmp_path / "whole", 2, longer))
    killed_and_resumed(file, tmp_path / "killed", 10, longer)
    assert_same_run(tmp_path / "killed" / ARM, tmp_path / "whole" / ARM, steps=80)


def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_from_the_one_before_if_it_is_damaged(whole, file, tmp_path):
    folder = tmp_path / ARM
    started = start(file, tmp_path, 1, "checkpoints.every=7")
    while not losses(folder).get(9):
        time.sleep(0.02)
    os.kill(started[0].pid, signal.SIGTERM)
    printed = finish(started, 128 + signal.SIGTERM)
    assert "stopped; the same command resumes from the last checkpoint" in printed
    last = last_whole(folder)
    assert last.name != "step20"
    [first, *_] = (last / "model_and_optim").glob("*.distcp")
    first.write_bytes(first.read_bytes()[:-1])
    printed = finish(start(file, tmp_path, 1, "checkpoints.every=7"))
    assert f"{last} is damaged (model_and_optim/{first.name} has " in printed
    assert losses(folder) == pytest.approx(losses(whole[0]), abs=1e-4)
    result = json.loads((folder / "result.json").read_text())
    assert result["tokens_seen"] == 20 * 8 * 32
