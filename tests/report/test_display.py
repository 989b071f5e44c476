"""What a study prints: its progress, and its rows beside the paper's."""

import re
from io import StringIO
from math import exp, nan
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gated_attention.report.study.terminal import Display
from gated_attention.study.plan import make_plan
from gated_attention.study.record import Measure, Result
from gated_attention.train.callbacks import Progress

CPU = torch.device("cpu")


def result_of(arm, loss):
    measures = {"val_loss_nats": Measure(loss, "nats/token", 1000), "val_perplexity": Measure(exp(loss), "1", 1000)}
    return Result(arm.plan.name, arm.variant.name, arm.seed, arm.resolve()["config"], measures, 1, "CPU", None, {})


@pytest.fixture
def printed():
    def run(losses, **choice):
        plan = make_plan(size="moe-tiny", seeds=1, output=Path(), device=CPU, **choice)
        console = Console(file=StringIO(), width=100)
        results = [result_of(arm, loss) for arm, loss in zip(plan.arms, losses, strict=True)]
        with Display(plan, CPU, console) as display:
            for arm, result in zip(plan.arms, results, strict=True):
                display.start(arm)
                display.finish(arm, result, kept=loss_is_kept(result))
            display.summary(results, Path("reports"))
        return console.file.getvalue()

    return run


def loss_is_kept(result):
    return result.variant == "baseline"


def test_a_table_stands_beside_the_papers(printed):
    text = printed((2.0, 1.9, 2.1, 1.8, 1.7, 1.6), table=6)
    assert "baseline seed 0: kept from an earlier run, validation loss 2.0000" in text
    assert "Table 6 of the paper above this study" in text
    lines = text.splitlines()
    (first,) = [i for i, line in enumerate(lines) if "5.847" in line]
    assert lines[first].split() == ["switch-kv-8-top-8", "5.847", "-0.0302", "same"]
    assert lines[first + 1].split() == ["T6.1", "6.686", "-0.1000"]
    assert "Table 6, Perplexity over 5 rows: rank correlation" in text
    assert "in 4 of 5" in " ".join(text.split())
    assert "Table 1, Perplexity" not in text  # only the table that was asked for


def test_named_variants_have_no_table_of_the_papers(printed):
    text = printed((2.0, nan), variants=["baseline", "sdpa-headwise"])
    assert "above this study" not in text
    assert "rank correlation" not in text
    assert "diverged" in text
    assert "nan" not in text


def test_a_table_without_its_own_baseline_brings_table_1s_and_names_what_is_left_out():
    plan = make_plan(size="tiny", seeds=1, output=Path(), device=CPU, table=6)
    assert [variant.name for variant in plan.variants][:2] == ["baseline", "switch-kv-4-top-4"]
    assert plan.name == "table-6-tiny"
    (reason,) = plan.left_out
    assert "switch kv 8 top 8 costs 175104 parameters per block, more than the FFN of size 'tiny'" in reason


def draw(**console):
    """What is printed of one arm that trains and ends."""
    plan = make_plan(variants=["baseline"], size="tiny", seeds=1, output=Path(), device=CPU, train={"steps": 40})
    console = Console(file=StringIO(), width=100, **console)
    (arm,) = plan.arms
    with Display(plan, CPU, console) as display:
        display.start(arm)
        for step in range(1, 41):
            display.progress(arm, Progress(step, 40, 5.0 - step / 20, 1234.5))
        display.finish(arm, result_of(arm, 2.5), kept=False)
    return console.file.getvalue()


def test_a_log_file_gets_lines_and_no_bars():
    lines = [line for line in draw().splitlines() if line.startswith("baseline seed 0")]
    assert len(lines) == 11
    assert lines[0] == "baseline seed 0: 4/40 steps, loss 4.800  1,234 tokens/s"
    assert lines[-1] == "baseline seed 0: validation loss 2.5000"


def test_a_terminal_gets_a_bar():
    text = draw(force_terminal=True)
    assert "40/40 steps validation loss 2.5000" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "seed 0: " not in text
