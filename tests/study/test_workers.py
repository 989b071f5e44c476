"""Arms side by side, in processes: the same numbers, a GPU each, and an end when anything ends."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import worker_tasks

from gated_attention.device import count_like
from gated_attention.study.plan import make_plan
from gated_attention.study.run import run_study
from gated_attention.study.workers import run_side_by_side

CPU = torch.device("cpu")


class Watcher:
    """Remembers what it was told; can stop a run at a step."""

    def __init__(self, stop_at=None):
        self.stop_at, self.told = stop_at, []

    def say(self, message):
        self.told.append(("say", message))

    def start(self, arm):
        self.told.append(("start", arm.key))

    def progress(self, arm, progress):
        self.told.append(("progress", arm.key, progress.step))
        if progress.step == self.stop_at:
            raise KeyboardInterrupt

    def finish(self, arm, result, kept):
        self.told.append(("kept" if kept else "finish", arm.key))


@pytest.fixture
def plan(tmp_path):
    def make(output="out", **settings):
        (tmp_path / "text.txt").write_text("".join(f"line {i} ends {i % 7}.\n" for i in range(3000)))
        (tmp_path / "held-out.txt").write_text("".join(f"line {i} ends {i % 7}.\n" for i in range(5000, 5200)))
        return make_plan(
            variants=["baseline", "sdpa-headwise"],
            size="tiny",
            output=tmp_path / output,
            device=CPU,
            data={
                "source": str(tmp_path / "text.txt"),
                "validation": str(tmp_path / "held-out.txt"),
                "block_size": 64,
                "max_validation_tokens": 1024,
            },
            train={"steps": 6, "batch_size": 2, "checkpoint_every": 2, "log_every": 1, "evaluate_every": 3},
            **{"seeds": 1, **settings},
        )

    return make


def losses(results):
    return {(r.variant, r.seed): r.measures["val_loss_nats"].value for r in results}


@pytest.mark.trust
def test_stopped_and_run_again_side_by_side_ends_as_one_after_the_other(plan, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        run_study(plan(), CPU, cache, Watcher(stop_at=3), side_by_side=2)
    assert multiprocessing.active_children() == []
    watcher = Watcher()
    results = run_study(plan(), CPU, cache, watcher, side_by_side=2)
    assert multiprocessing.active_children() == []
    alone = run_study(plan("alone"), CPU, cache, Watcher())
    assert losses(results) == pytest.approx(losses(alone), rel=1e-5)  # with fewer threads, sums have another order
    assert list(losses(results)) == [("baseline", 0), ("sdpa-headwise", 0)]
    for key in losses(results):
        told = [what for what, about, *_ in watcher.told if about == ("", *key)]
        assert (told[0], told[-1]) == ("start", "finish")
    assert ("say", "sdpa-headwise seed 0: measuring") in watcher.told


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, {"0", "1"}), pytest.param("3,GPU-b,1", {"3", "GPU-b"}, marks=pytest.mark.trust)]
)
def test_every_process_sees_one_gpu(plan, monkeypatch, visible, seen):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    watcher = Watcher()
    found = run_side_by_side(plan(seeds=2).arms, worker_tasks.tell_gpu, watcher, 2, on_gpus=True)
    assert {gpu for gpu, _ in found.values()} == seen
    assert len({pid for _, pid in found.values()} | {os.getpid()}) == 3
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert watcher.told.count(("say", "baseline seed 1: looking")) == 1


def test_devices_are_all_gpus_unless_torchrun_shares_them_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (count_like(torch.device("cuda")), count_like(CPU)) == (4, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert count_like(torch.device("cuda")) == 1


def test_an_error_ends_all(plan):
    with pytest.raises(ValueError, match="sdpa-headwise cannot train"):
        run_side_by_side(plan().arms, worker_tasks.fail_at_the_second, Watcher(), 2, on_gpus=False)
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_told_in_one_line(plan):
    with pytest.raises(RuntimeError, match="killed, perhaps for lack of memory; run the study again"):
        run_side_by_side(plan().arms, worker_tasks.die, Watcher(), 2, on_gpus=False)
    assert multiprocessing.active_children() == []


@pytest.mark.trust
def test_workers_end_with_a_killed_study(plan):
    study = plan()
    parent = multiprocessing.get_context("spawn").Process(target=worker_tasks.start_and_wait, args=(study.arms,))
    parent.start()
    deadline = time.monotonic() + 300
    try:
        while len(found := list(study.runs.glob("*/seed0/*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.join()
    workers = [int(path.name) for path in found]
    assert len(workers) == 2
    while any(state(pid) not in "ZX" for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its study"
        time.sleep(0.05)


def state(pid):
    """One letter: Z is a process that ended and that nobody asked about, X one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "X"
