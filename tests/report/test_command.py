"""The command under a report makes the same study, whatever its settings, and says what no command can."""

import shlex

import pytest
import torch
from finished_arms import report_of, write_arm
from typer.testing import CliRunner

from gated_attention.cli import app
from gated_attention.study import run as runs
from gated_attention.study.plan import make_plan

CPU = torch.device("cpu")


class PlanMadeError(Exception):
    """Ends a command once its plan is made."""


def plan_of(words, monkeypatch):
    """The plan that a command line makes, without running it."""
    made = []

    def keep(plan, *_):
        made.append(plan)
        raise PlanMadeError

    monkeypatch.setattr(runs, "run_study", keep)
    CliRunner().invoke(app, words)
    return made[0]


def printed_words(plan, tmp_path):
    """The words of the command that the report of a plan's arms prints."""
    for arm in plan.arms:
        resolved = arm.resolve()["config"] | {"study_learning_rate": plan.train.learning_rate}
        write_arm(tmp_path / "records" / plan.name, arm.variant.name, arm.seed, config=resolved)
    text = report_of(tmp_path / "records" / plan.name)
    program, *words = shlex.split(text.split("```sh\n")[1].split("\n```")[0].replace("\\\n", ""))
    assert program == "gated-attention"
    return text, words


def started(folder):
    """A study of two arms that others can go on from."""
    for variant in ("baseline", "sdpa-headwise"):
        checkpoint = folder / variant / "seed0" / "checkpoint-9"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        (checkpoint / "tokenizer.json").write_text("{}")
    return folder


SETTINGS = {
    "defaults": [],
    "variants": ["--variants", "sdpa-elementwise,baseline-lr-8", "--seeds", "2", "--name", "two words"],
    "mixture": ["--size", "moe-tiny", "--variants", "experts-x1.03,baseline"],
    "text": ["--data", "a file.txt", "--validation", "b.jsonl", "--text-field", "body", "--tokenizer", "bpe-300"],
    "sequences": ["--context", "128", "--bos", "--packing", "documents"],
    "steps": ["--steps", "7", "--batch-size", "3", "--accumulation", "2"],
    "optimizer": ["--learning-rate", "0.0025", "--warmup", "0.1", "--weight-decay", "0.5", "--no-compile"],
    "compiled": ["--compile"],
    "other seeds": ["--seeds", "2", "--first-seed", "3"],
    "base": ["--rope-theta", "500000"],
    "start": ["--from", "runs/s", "--variants", "baseline,sdpa-headwise"],
    "start and base": ["--from", "runs/s", "--variants", "sdpa-headwise", "--rope-theta", "5e5", "--context", "512"],
    "start and tokenizer": ["--from", "runs/s", "--variants", "baseline", "--tokenizer", "bytes"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_printed_command_makes_the_same_plan(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started(tmp_path / "runs" / "s")
    asked = plan_of(["compare", "--device", "cpu", *SETTINGS[name]], monkeypatch)
    text, words = printed_words(asked, tmp_path)
    printed = plan_of(words, monkeypatch)
    assert sorted(variant.name for variant in printed.variants) == sorted(v.name for v in asked.variants)
    for arm in asked.arms:
        again = next(other for other in printed.arms if other.key == arm.key)
        assert again.resolve() == arm.resolve()
    assert "No option of `compare`" not in text


def test_what_no_option_sets_is_said(tmp_path):
    made = make_plan(
        variants=["baseline"], size="tiny", seeds=1, output=tmp_path, device=CPU,
        data={"held_out": 0.2}, train={"beta2": 0.99, "steps": 100},
    )  # fmt: skip
    text, _ = printed_words(made, tmp_path)
    assert "No option of `compare` sets these as they were: `held_out` 0.2, `beta2` 0.99" in text


def test_a_report_says_what_a_study_goes_on_from(tmp_path, monkeypatch):
    study = started(tmp_path / "runs" / "s")
    settings = {"variants": ["baseline"], "size": "tiny", "seeds": 1, "output": tmp_path, "device": CPU}
    text, words = printed_words(make_plan(**settings, start=study, rope_theta=5e5), tmp_path)
    assert "trained on from the arms of the study `s` with RoPE's base 500,000 on `stdlib`" in text
    assert "from scratch" not in text
    assert words[words.index("--from") + 1] == "runs/s"  # not the folders of this machine
    assert str(tmp_path) not in text
    scratch, _ = printed_words(make_plan(**settings, name="other", data={"packing": "documents"}), tmp_path)
    assert "trained from scratch on `stdlib`" in scratch
    assert "the documents in a sequence kept apart" in scratch


def test_a_report_with_its_records_is_written_again_in_place(tmp_path):
    write_arm(tmp_path / "small" / "records", "baseline", 0)
    write_arm(tmp_path / "small" / "records", "sdpa-headwise", 0)
    found = CliRunner().invoke(app, ["report", str(tmp_path / "small")])
    assert found.exit_code == 0, found.output
    assert "[records](records)" in (tmp_path / "small" / "report.md").read_text()
