"""`train` on the command line: its plan, and what it refuses in one line; needs no OLMo-core."""

from pathlib import Path

import pytest

from gated_attention.cli import main
from gated_attention.cli import train as command

LAPTOP = Path(__file__).parents[2] / "examples" / "train" / "laptop.toml"


@pytest.fixture
def called(capsys, tmp_path, monkeypatch):
    """Runs `train`; returns its code, what it printed, and its error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments])
        printed = capsys.readouterr()
        assert not list(tmp_path.iterdir())
        return stop.value.code, printed.out, printed.err

    return call


def test_a_plan_is_printed_and_nothing_run(called):
    code, printed, _ = called(str(LAPTOP), "--plan", "--set", "schedule.steps=10", "--set", "cost.gpu=A100")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["model"] == "tiny sdpa-headwise: 0.919 M parameters; G1 sdpa headwise sigmoid"
    assert lines["run"] == "10 steps, 0.020 M tokens"
    assert "of 80.00 GB (A100)" in printed
    assert "weights 5.487 M, causal attention 1.180 M, gates 0.018 M" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "schedule.step=1"], "[schedule] has an unknown key 'step'; the nearest is 'steps'"),
        (["--plan", "--set", "cost.gpu=abacus"], "unknown cost.gpu 'abacus'; choose from A100, H100, H200, B200"),
        (
            ["--set", "parallel.gpus=2"],
            "start it with torchrun --nproc-per-node N -m gated_attention train, or add --set",
        ),
    ],
)
def test_bad_input_is_one_line(called, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    code, printed, error = called(str(LAPTOP), *arguments)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert message in error


def test_a_missing_file_is_one_line(called):
    assert (
        called("nowhere.toml")[2]
        == "error: nowhere.toml cannot be read (No such file or directory); see docs/train.md\n"
    )


def test_without_olmo_core_the_extra_is_named(called, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, error = called(str(LAPTOP))
    assert code == 2
    assert "pip install 'gated-attention[engine]'; --plan works without it" in error


def test_only_the_first_process_says_what_is_wrong(called, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert called(str(LAPTOP), "--set", "schedule.step=1") == (2, "", "")
