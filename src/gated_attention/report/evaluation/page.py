"""An evaluation as a document: what was evaluated, results, figures, tables, definitions, limitations."""

import shlex
from collections.abc import Iterator
from importlib import metadata

from gated_attention.jobs.evaluate import Evaluation
from gated_attention.report.blocks import Block, Bullets, CodeBlock, FigureBlock, Heading, Paragraph, TableBlock
from gated_attention.report.evaluation.figures import evaluation_figures
from gated_attention.report.evaluation.task_tables import task_tables
from gated_attention.report.study.sections import count_text, source_name

_CAPTIONS = {
    "length.svg": (
        "Loss by context length and position",
        "Left: the same tokens with more context. Right: loss by position in the longest context. The dashed line is "
        "the end of one context.",
    ),
    "retrieval.svg": (
        "Retrieval by length and depth",
        "Colour is the share of exact matches. The number in a cell is the loss of the answer in nats per token.",
    ),
}
_DEFINITIONS = {
    "perplexity": (
        "**Loss**: mean cross-entropy per token, natural logarithm. **Perplexity** is its exponential. **Bits per "
        "byte** is the loss in bits, divided by the bytes of the text. In the average, every domain weighs the same."
    ),
    "length": (
        "**Loss by length**: loss of the same tokens given more context; 1x is one context. **Damage** is the loss at "
        "1x minus that of plain RoPE at 1x."
    ),
    "retrieval": (
        "**Retrieval**: loss of the answer to a question about a fact in the text, and the share of answers that are "
        "exactly right. The table has the mean over depths."
    ),
    "quantization": (
        "**Quantisation**: loss with weights and activations rounded, minus the loss without. The note names the "
        "input that costs most when it alone is rounded."
    ),
}


def title(evaluation: Evaluation) -> str:
    """The document's title."""
    return f"Evaluation of {evaluation.label}"


def evaluation_blocks(evaluation: Evaluation) -> list[Block]:
    """The whole document."""
    tasks = evaluation.plan.tasks
    definitions = [text for task, text in _DEFINITIONS.items() if task in tasks]
    if any(one.benchmarks for one in evaluation.ropes):
        definitions.append(f"**Benchmarks**: as lm-eval {metadata.version('lm-eval')} defines them.")
    definitions.append("± is the standard error. n is the number of tokens, domains, samples or questions.")
    return [
        Heading(title(evaluation), level=1),
        _lead(evaluation),
        Heading("Results"),
        *_results(evaluation),
        *_figures(evaluation),
        Heading("Definitions"),
        Bullets(definitions),
        Heading("Limitations"),
        Bullets(list(_limitations(evaluation))),
        Heading("Reproduce"),
        CodeBlock(_command(evaluation)),
        Paragraph(
            "Every setting, version and number is in `evaluation.json`; `evaluation.csv` has the numbers.", "note"
        ),
    ]


def _lead(evaluation: Evaluation) -> Paragraph:
    ropes = len(evaluation.ropes)
    return Paragraph(
        f"`{evaluation.label}` ({evaluation.family}, {count_text(evaluation.num_parameters)} parameters, "
        f"{evaluation.dtype}) with a context of {evaluation.context:,} tokens on {evaluation.device}. "
        f"Tasks: {', '.join(evaluation.plan.tasks)}"
        f"{f', under {ropes} rotary embeddings' if ropes > 1 else ''}.",
        "lead",
    )


def _results(evaluation: Evaluation) -> Iterator[Block]:
    if not evaluation.is_complete:
        yield Paragraph("**Not complete:** some tasks have no numbers yet.")
    for heading, table in task_tables(evaluation):
        yield Heading(heading, level=3)
        yield TableBlock(table)


def _figures(evaluation: Evaluation) -> Iterator[Block]:
    figures = [FigureBlock(name, svg, *_CAPTIONS[name]) for name, svg in evaluation_figures(evaluation)]
    if figures:
        yield Heading("Figures")
        yield from figures


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


def _command(evaluation: Evaluation) -> str:
    """The `evaluate` call with every setting that differs from its default."""
    plan = evaluation.plan
    default = type(plan)(plan.model)
    options = {
        "tasks": "tasks", "data": "source", "text-field": "text_field", "field": "domain_field",
        "tokens": "num_tokens", "context": "context", "tokenizer": "tokenizer", "mode": "mode", "stride": "stride",
        "multiples": "multiples", "lengths": "lengths", "yarn": "yarn", "rope-theta": "rope_theta",
        "depths": "depths", "samples": "num_samples", "seed": "seed", "filler": "filler", "local-dir": "local",
        "limit": "limit", "shots": "shots",
    }  # fmt: skip
    words = ["gated-attention", "evaluate", shlex.quote(source_name(plan.model))]
    for option, name in options.items():
        value = getattr(plan, name)
        if value != getattr(default, name):
            words.append(f"--{option} {shlex.quote(_word(value))}")
    return " ".join([*words, *(["--run-code"] if plan.run_code else [])])


def _word(value: object) -> str:
    """An option's value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else source_name(str(value))
