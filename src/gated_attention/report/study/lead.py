"""What a study asks, and what it trained, on what and for how long, in words."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gated_attention.registry.architectures import ARCHITECTURES, OWN, Architecture
from gated_attention.registry.choices import TEXT
from gated_attention.registry.vision import VIT
from gated_attention.report.blocks import Block, Heading, Paragraph
from gated_attention.report.command_line import source_name
from gated_attention.report.study.sections import MANY, scale_text
from gated_attention.report.tables import count_text
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.record import Result

EQUAL_PARAMETERS = 0.01
"""Residue up to which parameter counts are called equal."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def question(results: Sequence[Result], comparison: Comparison) -> Paragraph:
    """What the study asks, and at which scale."""
    reference, *others = (f"`{row.variant}`" for row in comparison.rows)
    names = others if len(others) <= MANY else [f"{len(others)} variants"]
    asked = " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
    sought = "validation loss, attention sink, activations and speed"
    if comparison.task != TEXT:
        sought = "validation loss, accuracy, attention sinks and activations"
    text = f"How do{'es' * (len(others) == 1)} {asked} differ from {reference} in {sought}?"
    if not others:
        text = f"What does {reference} reach in {sought}?"
    return Paragraph(f"{text} Trained with {scale_text(results, comparison)}, {_seeds(results)}.", "lead")


def setup(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """What was trained, on what, for how long and where."""
    config, rows = results[0].config, comparison.rows
    number = _WORDS[len(rows)] if len(rows) < len(_WORDS) else str(len(rows))
    architecture = {**ARCHITECTURES, VIT.name: VIT}.get(config.get("architecture", OWN))
    title = architecture.title if architecture else config["architecture"]
    decoder = " decoder" if comparison.task == TEXT else ""
    text = f"{number.capitalize()} variant{'s' * (len(rows) > 1)} of one {title}{decoder}"
    if shape := ", ".join([*_shape(rows[0], config.get("model", {})), *_windows(architecture)]):
        text += f" ({shape})"
    text += f", {_origin(config)}{_data(config.get('data', {}))}: {_length(results)}, on {_place(results)}."
    if comparison.reference:
        text += f" They differ as the table says{_residue(results, rows)}; equal seeds see equal data in equal order."
    yield Heading("Setup")
    yield Paragraph(text)
    yield from _held_out_note(results) if comparison.task == TEXT else _image_note(results)


def _shape(row: VariantRow, model: Mapping[str, Any]) -> Iterator[str]:
    if row.parameters:
        yield f"{count_text(row.parameters)} parameters"
    if {"num_hidden_layers", "hidden_size"} <= model.keys():
        yield f"{model['num_hidden_layers']} layers of width {model['hidden_size']}"
    if experts := model.get("num_local_experts") or model.get("num_experts"):  # by version of transformers
        yield f"{experts} experts, {model['num_experts_per_tok']} per token"
    if {"num_attention_heads", "num_key_value_heads"} <= model.keys():
        yield f"{model['num_attention_heads']} query and {model['num_key_value_heads']} key/value heads"


def _windows(architecture: Architecture | None) -> Iterator[str]:
    if architecture and architecture.windows:
        yield architecture.windows.describe()


def _origin(config: Mapping[str, Any]) -> str:
    start, theta = config.get("start"), config.get("rope_theta")
    text = "trained from scratch"
    if start:  # <study>/<variant>/seed<k>/checkpoint-<step>
        text = f"trained on from the arms of the study `{PurePath(start).parents[2].name}`"
    return text + (f" with RoPE's base {theta:,g}" if theta else "")


def _data(data: Mapping[str, Any]) -> str:
    source = source_name(data.get("source", ""))
    text = f" on `{source}`" if source else ""
    text += " (the source text of Python's standard library)" if source == "stdlib" else ""
    text += f" with the `{source_name(data['tokenizer'])}` tokenizer" if data.get("tokenizer") else ""
    return text + (", the documents in a sequence kept apart" if data.get("packing") == "documents" else "")


def _seeds(results: Sequence[Result]) -> str:
    seeds = sorted(Counter(run.variant for run in results).values())
    plural = "s" * (seeds[-1] > 1)
    return f"{seeds[0]}{f' to {seeds[-1]}' * (seeds[0] < seeds[-1])} seed{plural} each"


def _length(results: Sequence[Result]) -> str:
    steps, tokens = results[0].config.get("train", {}).get("steps"), results[0].tokens_seen
    per_step = f"{steps:,} steps of {count_text(tokens // steps)} tokens, " if steps else ""
    return f"{_seeds(results)}, {per_step}{count_text(tokens)} tokens per run"


def _place(results: Sequence[Result]) -> str:
    config = results[0].config
    precision = config.get("train", {}).get("precision") or config.get("model", {}).get("dtype")
    devices = " and ".join(dict.fromkeys(run.device for run in results))
    return f"{devices} in {precision}" if precision else devices


def _residue(results: Sequence[Result], rows: Sequence[VariantRow]) -> str:
    largest = max((abs(row.residue) for row in rows if row.residue is not None), default=None)
    if largest is None:
        return ""
    narrowed = len({run.config.get("size", {}).get("intermediate_size") for run in results}) > 1
    share = f"{100 * largest:.1f} %" if largest > EQUAL_PARAMETERS else f"{max(100 * largest, 0.01):.2f} %"
    if largest > EQUAL_PARAMETERS or (largest and not narrowed):
        return f" and by up to {share} in parameters"
    agree = "are equal" if largest == 0.0 else f"agree within {share}"
    return f", the FFN narrowed so that parameter counts {agree}" if narrowed else f"; parameter counts {agree}"


def _image_note(results: Sequence[Result]) -> Iterator[Paragraph]:
    """How many images were seen and scored, and what a token is; nothing for records that do not say."""
    config = results[0].config
    images, data = config.get("images"), config.get("data", {})
    if not images:
        return
    patches = data["block_size"]
    seen = results[0].tokens_seen / patches
    yield Paragraph(
        f"A token is a patch, {patches} per image of {data['image_size']} x {data['image_size']} pixels. A run sees "
        f"{count_text(round(seen))} images, {seen / images['train_images']:.2g} times each of "
        f"{images['train_images']:,}, shifted and mirrored at random, the same in all variants. Loss and accuracy "
        f"are of {images['validation_images']:,} held-out images, points of the curves of {images['curve_images']:,}. "
        "Attention is averaged over all queries, the class token and registers included.",
        "note",
    )


def _held_out_note(results: Sequence[Result]) -> Iterator[Paragraph]:
    """Which text the losses of table and curve are of, and how much; nothing for records that do not say."""
    config = results[0].config
    text = config.get("text")
    if not text:
        return
    documents = f"{text['validation_kept_documents']:,} of {text['validation_documents']:,} documents"
    spread = ", spread evenly over them" if text["validation_kept_tokens"] < text["validation_tokens"] - 1 else ""
    note = (
        f"Validation loss in the table is of {text['validation_kept_tokens']:,} tokens out of "
        f"{text['validation_tokens']:,} held out ({documents}){spread}"
    )
    if text["curve_tokens"] < text["validation_kept_tokens"]:
        note += f"; points of the curves are of {text['curve_tokens']:,} of them, so that their ends differ from it"
    if config.get("data", {}).get("packing") == "documents":
        note += (
            ". As in training, a token sees only its own document; sinks, activations and gates are of sequences that "
            "hold one document."
        )
    else:
        note += ". As in training, a token sees all before it in its sequence, earlier documents included."
    yield Paragraph(note, "note")
