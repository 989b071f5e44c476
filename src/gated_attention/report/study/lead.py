"""What a study trained, on what and for how long, in words."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gated_attention.report.blocks import Paragraph
from gated_attention.report.study.sections import count_text, source_name
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.record import Result

EQUAL_PARAMETERS = 0.01
"""Residue up to which parameter counts are called equal."""

_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}


def lead(results: Sequence[Result], comparison: Comparison) -> Paragraph:
    """One paragraph: what was trained, on what, for how long and where."""
    config, rows = results[0].config, comparison.rows
    variants = f"{_WORDS.get(len(rows), str(len(rows)))} variant{'s' * (len(rows) > 1)}"
    text = (
        f"{variants.capitalize()} of one decoder{_shape(rows[0], config.get('model', {}))}, {_origin(config)}"
        f"{_data(config.get('data', {}))}{_length(results)}{_place(results)}."
    )
    if comparison.reference:
        text += f" They differ as the table says{_residue(results, rows)}; equal seeds see equal data in equal order."
    return Paragraph(text, "lead")


def _residue(results: Sequence[Result], rows: Sequence[VariantRow]) -> str:
    largest = max((abs(row.residue) for row in rows if row.residue is not None), default=None)
    if largest is None:
        return ""
    narrowed = len({run.config.get("size", {}).get("intermediate_size") for run in results}) > 1
    if largest > EQUAL_PARAMETERS or (largest and not narrowed):
        return f" and by up to {_percent(largest)} in parameters"
    agree = "are equal" if largest == 0.0 else f"agree within {_percent(largest)}"
    return f", the FFN narrowed so that parameter counts {agree}" if narrowed else f"; parameter counts {agree}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share > EQUAL_PARAMETERS else f"{max(100 * share, 0.01):.2f} %"


def _shape(row: VariantRow, model: Mapping[str, Any]) -> str:
    parts = [f"{count_text(row.parameters)} parameters"] if row.parameters else []
    if {"num_hidden_layers", "hidden_size"} <= model.keys():
        parts.append(f"{model['num_hidden_layers']} layers of width {model['hidden_size']}")
    if experts := model.get("num_local_experts") or model.get("num_experts"):  # by version of transformers
        parts.append(f"{experts} experts of which a token passes {model['num_experts_per_tok']}")
    if {"num_attention_heads", "num_key_value_heads"} <= model.keys():
        parts.append(f"{model['num_attention_heads']} query and {model['num_key_value_heads']} key/value heads")
    return f" ({', '.join(parts)})" if parts else ""


def _origin(config: Mapping[str, Any]) -> str:
    start, theta = config.get("start"), config.get("rope_theta")
    text = f"trained on from the arms of the study `{start_name(start)}`" if start else "trained from scratch"
    return text + (f" with RoPE's base {theta:,g}" if theta else "")


def start_name(start: str) -> str:
    """The study that a checkpoint, `<study>/<variant>/seed<k>/checkpoint-<step>`, belongs to."""
    return PurePath(start).parents[2].name


def _data(data: Mapping[str, Any]) -> str:
    source = source_name(data.get("source", ""))
    text = f" on `{source}`" if source else ""
    text += " (the source text of Python's standard library)" if source == "stdlib" else ""
    text += f" with the `{source_name(data['tokenizer'])}` tokenizer" if data.get("tokenizer") else ""
    return text + (", the documents in a sequence kept apart" if data.get("packing") == "documents" else "")


def _length(results: Sequence[Result]) -> str:
    seeds = sorted({len([other for other in results if other.variant == run.variant]) for run in results})
    each = f"{seeds[0]} seed{'s' * (seeds[0] > 1)} each" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds each"
    steps, tokens = results[0].config.get("train", {}).get("steps"), results[0].tokens_seen
    length = f"{count_text(tokens)} tokens a run"
    if steps:
        length = f"{steps:,} steps of {count_text(tokens // steps)} tokens, {length}"
    return f": {each}, {length}"


def _place(results: Sequence[Result]) -> str:
    config = results[0].config
    precision = config.get("train", {}).get("precision") or config.get("model", {}).get("dtype")
    devices = " and ".join(dict.fromkeys(run.device for run in results))
    return f", on {devices}{f' in {precision}' if precision else ''}"


def held_out_note(results: Sequence[Result]) -> str | None:
    """How much of which text the losses of table and curve are of; None for records that do not say."""
    config = results[0].config
    text, data = config.get("text"), config.get("data", {})
    if not text:
        return None
    documents = f"{text['validation_kept_documents']:,} of {text['validation_documents']:,} documents"
    spread = ", spread evenly over them" if text["validation_kept_tokens"] < text["validation_tokens"] - 1 else ""
    note = (
        f"Validation loss in the table is of {text['validation_kept_tokens']:,} tokens out of "
        f"{text['validation_tokens']:,} held out ({documents}){spread}"
    )
    if text["curve_tokens"] < text["validation_kept_tokens"]:
        note += f"; points of the curves are of {text['curve_tokens']:,} of them, so that their ends differ from it"
    if data.get("packing") == "documents":
        return (
            f"{note}. As in training, a token sees its own document only; sinks, activations and gates are of "
            "sequences that hold one document."
        )
    return f"{note}. As in training, a token sees all before it in its sequence, earlier documents included."
