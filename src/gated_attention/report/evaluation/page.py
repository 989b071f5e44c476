"""An evaluation as a document: what was evaluated, results, figures, definitions, limitations."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from gated_attention.jobs.evaluation import Evaluation
from gated_attention.report.blocks import (
    Block,
    Bullets,
    CodeBlock,
    Details,
    Heading,
    Links,
    Paragraph,
    TableBlock,
    explained,
    with_contents,
    write_document,
)
from gated_attention.report.command_line import plan_command, source_name
from gated_attention.report.evaluation.figures import evaluation_figures
from gated_attention.report.evaluation.record import csv_text, json_text, numbers
from gated_attention.report.evaluation.task_tables import task_tables
from gated_attention.report.tables import count_text

LONG = 8
"""Rows from which a table is collapsed."""


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.md`, `.html`, `.json`, `.csv` and the figures; figures of an earlier evaluation are removed.

    Raises:
        ValueError: if nothing can be written there.
    """
    files = {"evaluation.json": json_text(evaluation), "evaluation.csv": csv_text(numbers(evaluation))}
    return write_document(folder, "evaluation", evaluation_blocks(evaluation), files, ("length.svg", "retrieval.svg"))


def evaluation_blocks(evaluation: Evaluation) -> list[Block]:
    """The whole document."""
    return with_contents(_document(evaluation))


def _document(evaluation: Evaluation) -> Iterator[Block]:
    plan, ropes = evaluation.plan, len(evaluation.ropes)
    yield Heading(f"Evaluation of {evaluation.label}", level=1)
    yield Paragraph(
        f"`{evaluation.label}` ({evaluation.family}, {count_text(evaluation.num_parameters)} parameters, "
        f"{evaluation.dtype}) with a context of {evaluation.context:,} tokens on {evaluation.device}. "
        f"Tasks: {', '.join(plan.tasks)}{f', under {ropes} rotary embeddings' if ropes > 1 else ''}.",
        "lead",
    )
    yield Heading("Results")
    if not evaluation.is_complete:
        yield Paragraph("**Not complete:** some tasks have no numbers yet.")
    tables = dict(task_tables(evaluation))
    for heading, table in tables.items():
        yield Heading(heading, level=3)
        block = TableBlock(table)
        yield block if len(table.rows) < LONG else Details(f"{len(table.rows)} rows", [block])
    if figures := list(evaluation_figures(evaluation)):
        yield Heading("Figures")
        yield from figures
    yield Heading("Definitions")
    yield explained("All columns", *tables.values())
    notes = ["± is the standard error."]
    if "length" in plan.tasks:
        notes.append("Loss by length is of the same tokens given more context; 1x is one context.")
    if any(one.benchmarks for one in evaluation.ropes):
        notes.append(f"Benchmarks are as lm-eval {metadata.version('lm-eval')} defines them.")
    yield Paragraph(" ".join(notes), "note")
    yield Heading("Limitations")
    yield Bullets(list(_limitations(evaluation)))
    yield Heading("Reproduce")
    yield CodeBlock(plan_command("evaluate", [plan.model], plan))
    yield Paragraph("Every setting, version and number is in `evaluation.json`.", "note")
    yield Links("Files", {name: name for name in ("evaluation.json", "evaluation.csv")})


def _limitations(evaluation: Evaluation) -> Iterator[str]:
    plan = evaluation.plan
    yield "One model, one checkpoint: the numbers have no spread over seeds."
    if {"perplexity", "length", "quantization"} & set(plan.tasks):
        yield (
            f"About {count_text(plan.num_tokens)} tokens of `{source_name(plan.source)}` per task. "
            "Whether the model was trained on this text is not known."
        )
        yield "Losses per token compare only between models with one tokenizer; bits per byte compare between all."
    if "retrieval" in plan.tasks:
        yield f"Retrieval has {plan.num_samples} samples per length and depth."
    if plan.limit is not None:
        yield f"Benchmarks are limited to {plan.limit} questions each."
