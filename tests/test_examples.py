"""The scripts under examples run, and print what their first lines promise."""

import re
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    runpy.run_path(str(EXAMPLES / script))["main"](*arguments)


def test_every_example_is_run_here_and_short():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert all(30 <= len(text.splitlines()) <= 60 for text in scripts.values())


def test_gate_your_model(capsys):
    run("gate_your_model.py")
    printed = capsys.readouterr().out
    plain, gated = map(float, re.findall(r"loss ([\d.]+)", printed))
    asked, others = map(float, re.findall(r"[\d.]+(?= at)", printed))
    assert gated < plain / 10
    assert others < 0.1
    assert asked > 0.5


# transformers' Trainer asks for a pinned loader on machines without an accelerator.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_compare_variants_then_look_inside_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("compare_variants.py", tmp_path)
    assert re.search(r"^mine: .*, held-out loss [\d.]+ nats per token, [+-][\d.]+: \w+", capsys.readouterr().out, re.M)
    assert (tmp_path / "reports" / "example" / "report.html").exists()
    run("look_inside.py", str(tmp_path / "runs" / "example" / "mine" / "seed0"))
    assert len(re.findall(r"^ +\d ", capsys.readouterr().out, re.M)) == 2  # a line per layer


def test_look_inside_a_fresh_model(capsys):
    run("look_inside.py")
    printed = capsys.readouterr().out
    assert "gate at sdpa" in printed
    assert len(re.findall(r"^ +\d ", printed, re.M)) == 3
