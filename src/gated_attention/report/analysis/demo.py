"""`demo`: models read one prompt, and one figure shows where they look, their sinks and their gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.analysis import Inspection, TextBatch, inspect_model
from gated_attention.files import replacing, write_text, writing_to
from gated_attention.jobs.analyze import unique_labels
from gated_attention.jobs.named_model import check_tokenizer, find_checkpoint, load_checkpoint
from gated_attention.report import plots
from gated_attention.report.analysis.overview import ReadPrompt, overview
from gated_attention.report.tables import ABSENT, Cell, Column, Table, table_of
from gated_attention.spec import SITE_LABELS, SITES

DEFAULT_PROMPT = "The cat sat on the mat, and the dog that had chased it lay in the sun."
"""A text short enough that every token of a language model's vocabulary keeps a legible place."""

MAP_TOKENS = 64
"""Tokens that an attention map shows at the most, so that one column stays visible."""

FORMATS = (".png", ".svg")
_DOTS_PER_INCH = 200
_TITLE_CHARACTERS = 90


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """Which models read what.

    Attributes:
        models: Folders or hub names.
        layers: Whose attention is drawn; None is the first, the middle and the last of each model.
        tokenizer: One for all models; None is each model's own.
        output: The figure's file, `.png` or `.svg`.
    """

    models: tuple[str, ...]
    prompt: str = DEFAULT_PROMPT
    layers: tuple[int, ...] | None = None
    tokenizer: str | None = None
    output: Path = Path("demo.png")

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("demo needs at least one model; give a folder or a hub name")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; give a text of at least two tokens")
        if not self.prompt.isascii() and self.prompt.encode("utf-8", "ignore").decode() != self.prompt:
            raise ValueError("the prompt is not UTF-8; give a text of characters")
        if self.output.suffix.lower() not in FORMATS:
            raise ValueError(f"{self.output} is no kind of figure; choose from {', '.join(FORMATS)}")
        if self.output.is_dir():
            raise ValueError(f"{self.output} is a folder; give --output a file")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers from what a caller writes, e.g. `0,13,27`; each once, in ascending order.

    Raises:
        ValueError: if a part is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ValueError(f"layers is {text!r}; give numbers separated by commas, e.g. 0,2,3") from error


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One model's reading of the prompt; `label` is unique among the models of one call."""

    label: str
    num_tokens: int
    tokens: tuple[str, ...]
    inspection: Inspection


def demo(plan: DemoPlan, device: torch.device, say: Callable[[str], None] = lambda message: None) -> list[Reading]:
    """Let the models read the prompt, one after the other, and write the figure.

    Raises:
        ValueError: if a model cannot be read, lacks a layer, or does not fit the prompt, or nothing can be written.
    """
    checkpoints = [find_checkpoint(name) for name in plan.models]
    readings = []
    for checkpoint, label in zip(checkpoints, unique_labels(checkpoints), strict=True):
        say(f"reading with {checkpoint.name}")
        model, tokenizer = load_checkpoint(checkpoint, device, plan.tokenizer)
        readings.append(_read(plan, label, checkpoint.name, model, tokenizer))
        del model
    _write(draw(plan, readings), plan.output)
    return readings


def _read(plan: DemoPlan, label: str, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Reading:
    ids = torch.tensor([tokenizer(plan.prompt)["input_ids"]])
    positions = getattr(model.config, "max_position_embeddings", None) or ids.shape[1]
    if not 2 <= ids.shape[1] <= positions:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens for {name}; it reads 2 to {positions}")
    batch = TextBatch(ids, torch.ones(1, dtype=torch.bool))
    check_tokenizer(model, int(ids.max()), name)
    try:
        inspection = inspect_model(model, [batch], map_layers=plan.layers, map_size=MAP_TOKENS)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    texts = tuple(str(tokenizer.decode([int(token)])) for token in ids[0])
    return Reading(label, ids.shape[1], texts, inspection)


def draw(plan: DemoPlan, readings: Sequence[Reading]) -> Figure:
    """The figure of these readings."""
    text = " ".join(plan.prompt.split())
    shown = text if len(text) <= _TITLE_CHARACTERS else f"{text[: _TITLE_CHARACTERS - 1]}…"
    longest = max(reading.num_tokens for reading in readings)
    cut = f"; maps of the first {MAP_TOKENS} tokens" if longest > MAP_TOKENS else ""
    strokes = plots.strokes_for(reading.label for reading in readings)
    title = f"“{shown}”{cut}"
    return overview({reading.label: _shown(reading) for reading in readings}, strokes, title)


def _shown(reading: Reading) -> ReadPrompt:
    found = reading.inspection
    return ReadPrompt(
        maps=found.attention_maps.astype(np.float64),
        layers=[int(layer) for layer in found.attention_layers],
        tokens=reading.tokens[:MAP_TOKENS],
        sinks=found.by_layer("f_attn"),
        gates=_gate_scores(found),
        uniform=found.overall("f_attn_uniform"),
    )


def _gate_scores(found: Inspection) -> dict[str, np.ndarray]:
    """Mean gate score of each layer, sites in the paper's order."""
    return {SITE_LABELS[site]: found.gates[site].by_layer("gate_mean") for site in SITES if site in found.gates}


def _write(figure: Figure, path: Path) -> None:
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".svg":
            write_text(path, plots.to_svg(figure, salt="demo"))
        else:
            with replacing(path) as file:
                plots.write_png(figure, file, _DOTS_PER_INCH)


def summary_table(readings: Sequence[Reading]) -> Table:
    """One row for each model: its tokens, its sink and its gates."""
    sinks = [reading.inspection.by_layer("f_attn") for reading in readings]
    return table_of(
        {
            Column("Model", numeric=False): [Cell(reading.label) for reading in readings],
            Column("Tokens"): [Cell(str(reading.num_tokens)) for reading in readings],
            Column("Attention on the first token"): [Cell(f"{np.nanmean(values):.3f}") for values in sinks],
            Column("If spread evenly"): [
                Cell(f"{reading.inspection.overall('f_attn_uniform'):.3f}") for reading in readings
            ],
            Column("Strongest, at layer"): [Cell(f"{np.nanmax(v):.3f}, {np.nanargmax(v)}") for v in sinks],
            Column("Gate score", numeric=False): [_gate_cell(_gate_scores(r.inspection)) for r in readings],
        }
    )


def _gate_cell(gates: dict[str, np.ndarray]) -> Cell:
    words = [
        f"{site} {np.nanmean(v):.3f}, least {np.nanmin(v):.3f} at layer {np.nanargmin(v)}" for site, v in gates.items()
    ]
    return Cell("; ".join(words) or ABSENT)
