"""Whatever ends a study, and whenever, the same command goes on and ends in the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest

pytestmark = pytest.mark.trust

HOOK = """
import os, pathlib, signal, sys

kind = sys.argv[1]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    wrapped = getattr(owner, name)
    def move(self, target):
        if kind in (pathlib.Path(target).name, pathlib.Path(target).parent.name):
            die()
        return wrapped(self, target)
    setattr(owner, name, move)

def halved(owner, name, place):
    wrapped = getattr(owner, name)
    def write(*arguments, **options):
        path = arguments[place]
        wrapped(*arguments, **options)
        if os.path.basename(str(path)) == kind:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    setattr(owner, name, write)

before(pathlib.Path, "replace")
before(pathlib.Path, "rename")
import safetensors.torch, torch
halved(safetensors.torch, "save_file", 1)
halved(torch, "save", 1)
import transformers.trainer_callback
halved(transformers.trainer_callback.TrainerState, "save_to_json", 1)
from gated_attention.train.callbacks import MetricsCallback
append = MetricsCallback._append
def torn(self, line):
    append(self, line)
    if kind == "metrics.jsonl":
        os.truncate(self.path, self.path.stat().st_size - 9)
        die()
MetricsCallback._append = torn
from gated_attention.cli import main
main(sys.argv[2:])
"""

KINDS = (
    *("packed", "config.json", "metrics.jsonl", "model.safetensors", "optimizer.pt", "rng_state.pth"),
    *("trainer_state.json", ".whole.json", "arrays.npz", "result.json", "README.md", "report.html"),
)
"""What is being written when the kill comes, in the order of a run."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(f"file {i}\n" + "".join(f"line {j} of {i + j}\n" for j in range(300)))
    return root


@pytest.fixture(scope="module")
def whole(place):
    start = time.monotonic()
    subprocess.run(command(place, "whole"), env=environment(place, "whole"), check=True, capture_output=True)
    return left_behind(place / "whole"), time.monotonic() - start


def command(place, name, kind=None):
    start = ["-m", "gated_attention"] if kind is None else ["-c", HOOK, kind]
    settings = ["--variants", "sdpa-headwise", "--steps", "6", "--context", "64", "--batch-size", "2"]
    data = ["--data", str(place / "corpus"), "--device", "cpu", "--output", str(place / name)]
    return [sys.executable, *start, "compare", *settings, *data]


def environment(place, name):
    return os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place / f"cache-{name}")}


def left_behind(output):
    """Everything that a study leaves, but for what a clock or the memory decides."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        if path.name in ("model.safetensors", "optimizer.pt", "arrays.npz", "loss.svg", "gate_scores.svg", "README.md"):
            found[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]
        elif path.name == "result.json":
            measures = json.loads(path.read_text())["measures"]
            clocked = ("train_tokens_per_s", "peak_memory_gib")
            found[name] = {key: value for key, value in measures.items() if key not in clocked}
        else:
            found[name] = None
    return found


def ends_as(whole, place, name):
    done = subprocess.run(
        command(place, name), env=environment(place, name), check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    found = left_behind(place / name)
    assert found.keys() == whole.keys()
    assert [path for path in found if found[path] != whole[path]] == []
    assert [path.name[0] for path in (place / f"cache-{name}" / "gated_attention" / "packed").iterdir()] != ["."]


def test_kills_while_each_kind_of_file_is_written(place, whole):
    for kind in KINDS:
        done = subprocess.run(
            command(place, "kinds", kind), check=False, env=environment(place, "kinds"), capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, f"{kind}: {done.stderr[-500:]}"
    ends_as(whole[0], place, "kinds")


def test_kills_at_random_moments(place, whole):
    random = Random(16)
    for _ in range(6):
        process = subprocess.Popen(
            command(place, "random"), env=environment(place, "random"), stdout=subprocess.DEVNULL
        )
        try:
            process.wait(random.uniform(0.2, 0.9) * whole[1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    ends_as(whole[0], place, "random")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_in_one_line_and_lose_nothing(place, whole, number, code):
    name = f"signal-{code}"
    process = subprocess.Popen(
        command(place, name), env=environment(place, name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not list((place / name).glob("runs/*/*/*/checkpoint-*/.whole.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "stopped; the same command resumes from the last checkpoint\n")
    assert not list((place / name).rglob(".lock"))
    ends_as(whole[0], place, name)


def test_a_second_study_on_the_same_output_is_one_line(place, whole):
    first = subprocess.Popen(command(place, "twice"), env=environment(place, "twice"), stdout=subprocess.DEVNULL)
    while not list((place / "twice").rglob("metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # or it may end before the others have started
    report = [sys.executable, "-m", "gated_attention", "report", str(place / "twice" / "runs" / "compare-tiny")]
    for words in (command(place, "twice"), report):
        second = subprocess.run(words, env=environment(place, "twice"), check=False, capture_output=True, text=True)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        assert second.stderr.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    ends_as(whole[0], place, "twice")
