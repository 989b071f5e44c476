import os
import re
import signal
import subprocess
import sys
import time
from inspect import signature
from typing import get_args

import pytest
import typer

from gated_attention.analysis.inspect import Level
from gated_attention.cli import app, main
from gated_attention.cli.models import analyze, convert, evaluate
from gated_attention.cli.study import compare
from gated_attention.evaluate.perplexity import Mode
from gated_attention.models.convert.convert import Target
from gated_attention.registry.variants import TABLES
from gated_attention.sizes import SIZES
from gated_attention.train.text.blocks import Packing

SMALL = ["--context", "64", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"file {i}\n" + "".join(f"line {j} of {i + j}\n" for j in range(300)))
    return str(folder)


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("command", "option", "kind"),
    [(compare, "packing", Packing), (analyze, "level", Level), (evaluate, "mode", Mode), (convert, "to", Target)],
)
def test_an_option_offers_the_choices_of_the_library(command, option, kind):
    # The command line types them again, because the modules that define them import PyTorch.
    choices, _ = get_args(signature(command).parameters[option].annotation)
    assert set(get_args(choices)) == set(get_args(kind))


@pytest.mark.parametrize(("option", "names"), [("size", SIZES), ("table", map(str, TABLES))])
def test_the_help_of_compare_names_every_size_and_table(option, names):
    _, info = get_args(signature(compare).parameters[option].annotation)
    words = re.findall(r"[\w.-]*\w", info.help)
    assert [name for name in names if name not in words] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "baseline,nope"], "unknown variant 'nope'; choose from baseline"),
        (["--size", "huge"], "unknown size 'huge'"),
        (["--steps", "-5"], "steps is -5"),
        (["--seeds", "0"], "seeds is 0"),
        (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--data", "/no/such/path"], "/no/such/path"),
        (["--tokenizer", "bpe-10"], "bpe-10"),
        (["--learning-rate", "0"], "learning_rate is 0"),
        (["--table", "1", "--variants", "baseline"], "table 1 and variants baseline were both asked for"),
        (["--table", "5"], "no variant is a row of table 5; choose from 1, 2, 3, 4, 6"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    error = fails(["compare", "--output", str(tmp_path / "out"), *arguments], capsys)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_empty_and_tiny_corpora_are_refused(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    (tiny / "a.txt").write_text("a few words")
    (tiny / "b.txt").write_text("and a few more")
    for path in (empty, tiny):
        error = fails(["compare", "--data", str(path), "--output", str(tmp_path / "out")], capsys)
        assert str(path) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f" {name} " in capsys.readouterr().out


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gated_attention.study.plan.make_plan", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["compare"])
    assert stop.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.setattr("gated_attention.models.convert.convert", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "here", "there"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"


def test_report_of_nothing(tmp_path, capsys):
    assert "is not a folder" in fails(["report", str(tmp_path / "nowhere")], capsys)
    assert "no finished run" in fails(["report", str(tmp_path)], capsys)


def test_variants_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["variants"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "sdpa-elementwise" in output
    assert "T1.5" in output


def test_compare_trains_measures_and_reports(tmp_path, corpus, capsys):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--steps", "3", "--data", corpus, "--output", str(output), "--device", "cpu", *SMALL])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "sdpa-elementwise" in printed
    assert "n = 1" in printed
    report = output / "reports" / "compare-tiny"
    assert {path.name for path in report.iterdir()} == {"report.md", "report.html", "table.csv", "figures"}
    assert "http" not in (report / "report.html").read_text().replace("http://www.w3.org", "").split("<body")[0]
    assert len(list((output / "runs" / "compare-tiny").glob("*/seed0/result.json"))) == 3


def test_help_is_fast_and_imports_nothing_heavy():
    heavy = "sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    code = f"import sys, gated_attention.cli as c\ntry: c.main(['--help'])\nfinally: print({heavy})"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert time.perf_counter() - start < 3  # a bound for a busy machine; alone it takes 0.3 s


@pytest.mark.trust
def test_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, corpus):
    def command(output):
        arguments = ["--variants", "baseline", "--steps", "30", "--data", corpus, "--device", "cpu", *SMALL]
        return [sys.executable, "-m", "gated_attention", "compare", "--output", str(output), *arguments]

    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    arm = tmp_path / "broken" / "runs" / "compare-tiny" / "baseline" / "seed0"
    process = subprocess.Popen(command(tmp_path / "broken"), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(arm.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (arm / "result.json").exists()
    for output in ("broken", "whole"):
        subprocess.run(command(tmp_path / output), env=environment, check=True, capture_output=True)
    tables = [(tmp_path / o / "reports" / "compare-tiny" / "table.csv").read_text() for o in ("broken", "whole")]
    assert without_clock(tables[0]) == without_clock(tables[1])


def without_clock(table):
    header, *rows = (line.split(",") for line in table.splitlines())
    timed = [i for i, name in enumerate(header) if "tokens_per_s" in name or "memory" in name or "time" in name]
    return [[cell for i, cell in enumerate(row) if i not in timed] for row in (header, *rows)]
