"""A study of many points: stopped and run again it ends the same, and one bad arm does not stop the rest."""

import json
from dataclasses import replace

import pytest
import torch
import worker_tasks

from gated_attention.cli import main
from gated_attention.study import run as study_run
from gated_attention.study.grid.run import find_failures, find_points, run_grid
from gated_attention.study.grid.study_file import read_study
from gated_attention.study.workers import run_side_by_side

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BASE = """
name = "small"
variants = ["baseline"]
size = "tiny"
learning_rate = [0.004, 900.0]
weight_decay = 0.0
optimizer = "muon"
residual = "bfloat16"
qk_norm = false
steps = 4
batch_size = 2
context = 32
checkpoint_every = 2
evaluate_every = 2
log_every = 1
device = "cpu"
"""


class Watcher:
    def __init__(self, stop_at=None):
        self.stop_at, self.started, self.ended, self.failed = stop_at, [], [], {}

    def say(self, message):
        pass

    def start(self, arm):
        self.started.append(arm.key)

    def progress(self, arm, progress):
        if (*arm.key, progress.step) == self.stop_at:
            raise KeyboardInterrupt

    def finish(self, arm, result, kept):
        self.ended.append((arm.key, kept))

    def fail(self, arm, reason):
        self.failed[arm.key] = reason


@pytest.fixture
def study(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {i} ends {i % 7}.\n" for i in range(3000)))
    (tmp_path / "study.toml").write_text(f'{BASE}data = "{tmp_path / "text.txt"}"\n')
    return read_study(tmp_path / "study.toml")


def test_a_study_without_text_leaves_nothing(study, tmp_path):
    (tmp_path / "text.txt").unlink()
    with pytest.raises(ValueError, match="no file or folder"):
        run_grid(study, tmp_path, CPU, tmp_path / "cache", Watcher())
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["study.toml"]
    assert not (tmp_path / "runs").exists()


def losses(results):
    found = {run.config["train"]["learning_rate"]: run.measures["val_loss_nats"].value for run in results}
    return repr(found)  # NaN equals no NaN


def exits(arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code


def test_stopped_failed_and_run_again_a_study_ends_as_an_uninterrupted_one(study, tmp_path, monkeypatch):
    runs, cache, train = tmp_path / "runs" / "small", tmp_path / "cache", study_run.train
    low, high = (f"learning-rate-{rate}" for rate in ("0.004", "900"))
    with pytest.raises(KeyboardInterrupt):
        run_grid(study, tmp_path, CPU, cache, Watcher((low, "baseline", 0, 3)))

    def fail(model, config, **rest):
        if config.learning_rate > 1:
            raise torch.OutOfMemoryError("tried to allocate\n20 GiB")
        return train(model, config, **rest)

    monkeypatch.setattr(study_run, "train", fail)
    watcher = Watcher()
    results, failures = run_grid(study, tmp_path, CPU, cache, watcher)
    assert watcher.started == [(low, "baseline", 0), (high, "baseline", 0)]
    assert watcher.failed == {(high, "baseline", 0): "out of memory: tried to allocate 20 GiB"}
    assert len(results) == 1
    assert find_failures(runs) == failures
    exits(["report", str(runs)])
    page = (tmp_path / "reports" / "small" / "report.md").read_text()
    assert "1 arm failed" in page
    assert "- `baseline` seed 0 at `learning-rate-900`: out of memory: tried to allocate 20 GiB" in page

    def spoil(model, config, **rest):
        if config.learning_rate > 1:
            torch.nn.init.constant_(model.model.norm.weight, torch.nan)
        return train(model, config, **rest)

    monkeypatch.setattr(study_run, "train", spoil)
    watcher = Watcher()
    results, failures = run_grid(study, tmp_path, CPU, cache, watcher)
    assert watcher.ended == [((low, "baseline", 0), True), ((high, "baseline", 0), False)]
    assert (failures, find_failures(runs)) == ([], [])
    whole, _ = run_grid(study, tmp_path / "whole", CPU, cache, Watcher())
    assert losses(results) == losses(whole)
    assert [len(found) for found in find_points(runs).values()] == [1, 1]
    # A loss that is no longer finite is a result, training ended early, and the page says so.
    assert "900.0: nan" in losses(results)
    assert results[1].tokens_seen == 2 * 32
    exits(["report", str(runs)])
    page = (tmp_path / "reports" / "small" / "report.md").read_text()
    assert "**Divergences**: `baseline` 1." in page
    assert "| 900 | diverged |" in page
    assert "arm failed" not in page
    assert str(tmp_path) not in page

    written = (runs / "study.toml").read_text()
    assert 'precision = "float32"' in written
    points = {name: replace(point, residual="float32") for name, point in study.points.items()}
    with pytest.raises(
        ValueError, match=r"was run with train\.residual 'bfloat16', not 'float32'; choose another name"
    ):
        run_grid(replace(study, points=points), tmp_path, CPU, cache, Watcher())
    assert (runs / "study.toml").read_text() == written


@pytest.mark.trust
def test_a_killed_process_costs_its_arm_alone(study, tmp_path):
    lost = {}
    points = {name: replace(one, variants=("baseline", "sdpa-headwise")) for name, one in study.points.items()}
    arms = [arm for plan in replace(study, points=points).plans(tmp_path, CPU) for arm in plan.arms]
    found = run_side_by_side(
        arms,
        worker_tasks.die_if_baseline,
        Watcher(),
        1,
        on_gpus=False,
        on_error=lambda arm, error: lost.update({arm.key: error}),
    )
    assert [key[1] for key in found] == ["sdpa-headwise"] * 2
    assert [key[1] for key in lost] == ["baseline"] * 2
    assert all("killed, perhaps for lack of memory" in str(error) for error in lost.values())


def test_the_command_plans_and_runs_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "text.txt").write_text("".join(f"line {i} ends {i % 7}.\n" for i in range(3000)))
    (tmp_path / "study.toml").write_text(BASE.replace(", 900.0", "") + 'data = "text.txt"\n')
    exits(["study", "study.toml", "--plan"])
    printed = capsys.readouterr().out
    assert "small: 1 arm = 1 point x 1 variant x 1 seed, 256 tokens in all" in printed
    assert "by a rough guess for CPU" in printed
    exits(["study", "study.toml", "--plan", "--gpu", "H200"])
    assert "about 0.67 minutes on 1 device, by other studies on an H200" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    exits(["study", "study.toml", "--plan", "--gpu", "B12"], 2)
    exits(["study", "study.toml", "--gpu", "H200"], 2)
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown GPU 'B12'; choose from H200, H100, A100",
        "error: --gpu is for the plan; add --plan",
    ]
    exits(["study", "study.toml"])
    printed = capsys.readouterr().out
    assert "1/1 baseline seed 0, learning-rate-0.004: validation loss" in printed
    assert (tmp_path / "reports" / "small" / "report.html").exists()
    assert {path.name for path in (tmp_path / "reports" / "small" / "figures").iterdir()} == {
        "loss_by_rate.svg",
        "m_act_by_rate.svg",
    }
    exits(["study", "study.toml", "--plan"])
    assert "by 1 finished arm on CPU" in capsys.readouterr().out
    (tmp_path / "study.toml").write_text(BASE + "leaning_rate = 1\n")
    exits(["study", "study.toml"], 2)
    assert capsys.readouterr().err == (
        "error: study.toml has an unknown key 'leaning_rate'; the nearest is 'learning_rate'\n"
    )
    record = json.loads((tmp_path / "runs/small/learning-rate-0.004/baseline/seed0/result.json").read_text())
    assert record["study"] == "small"
