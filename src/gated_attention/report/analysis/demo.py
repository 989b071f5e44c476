"""`demo`: models read one prompt, and one figure shows where they look, their sinks and their gates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.analysis import TextBatch, inspect_model
from gated_attention.files import replacing, write_text, writing_to
from gated_attention.jobs.analyze import unique_labels
from gated_attention.jobs.named_model import check_tokenizer, find_checkpoint, load_checkpoint
from gated_attention.report import plots
from gated_attention.report.analysis.overview import MAP_TOKENS, Reading, overview
from gated_attention.report.tables import Column, Table, table_of

DEFAULT_PROMPT = "The cat sat on the mat, and the dog that had chased it lay in the sun."
"""Short enough that every token's text is legible in the figure."""

FORMATS = (".png", ".svg")
_DOTS_PER_INCH = 200
_TITLE_CHARACTERS = 90


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """Which models read what, and where the figure goes.

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
    figure = draw(plan, readings)
    with writing_to(plan.output):
        plan.output.parent.mkdir(parents=True, exist_ok=True)
        if plan.output.suffix.lower() == ".svg":
            write_text(plan.output, plots.to_svg(figure, salt="demo"))
        else:
            with replacing(plan.output) as file:
                missing = plots.write_png(figure, file, _DOTS_PER_INCH)
            if missing:
                say(f"no installed font has {missing}: {plan.output} shows placeholders; an .svg keeps the text")
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
    return Reading(label, tuple(str(tokenizer.decode([int(token)])) for token in ids[0]), inspection)


def draw(plan: DemoPlan, readings: Sequence[Reading]) -> Figure:
    """The figure of these readings."""
    text = " ".join(plan.prompt.split())
    shown = text if len(text) <= _TITLE_CHARACTERS else f"{text[: _TITLE_CHARACTERS - 1]}…"
    longest = max(reading.num_tokens for reading in readings)
    cut = f"; maps of the first {MAP_TOKENS} tokens" if longest > MAP_TOKENS else ""
    return overview(readings, f"“{shown}”{cut}")


def summary_table(readings: Sequence[Reading]) -> Table:
    """A row for each model: its tokens, its sink and its gates."""
    sinks = [reading.inspection.by_layer("f_attn") for reading in readings]
    uniform = [reading.inspection.overall("f_attn_uniform") for reading in readings]
    return table_of(
        {
            Column("Model", numeric=False): [reading.label for reading in readings],
            Column("Tokens"): [str(reading.num_tokens) for reading in readings],
            Column("Attention on the first token"): [f"{np.nanmean(values):.3f}" for values in sinks],
            Column("If spread evenly"): [f"{share:.3f}" for share in uniform],
            Column("Strongest, at layer"): [f"{np.nanmax(v):.3f}, {np.nanargmax(v)}" for v in sinks],
            Column("Gate score", numeric=False): [_gate_words(reading) for reading in readings],
        }
    )


def _gate_words(reading: Reading) -> str:
    words = [
        f"{site} {np.nanmean(scores):.3f}, least {np.nanmin(scores):.3f} at layer {np.nanargmin(scores)}"
        for site, scores in reading.gates.items()
    ]
    return "; ".join(words)
