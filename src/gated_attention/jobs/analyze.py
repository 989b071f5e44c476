"""`analyze`: inspects models side by side while they read the same text, or the same images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.analysis import InputBatch, Inspection, TextBatch, inspect_model
from gated_attention.analysis.ablation import mean_ablation
from gated_attention.analysis.encoders import encoder_of, patch_grid
from gated_attention.analysis.families import find_attention
from gated_attention.analysis.inspect import Level
from gated_attention.device import device_name
from gated_attention.jobs.images import image_batches, image_size, load_images
from gated_attention.jobs.named_model import (
    Checkpoint,
    check_tokenizer,
    find_checkpoint,
    find_tokenizer,
    load_any,
    name_dtype,
    num_positions,
)
from gated_attention.jobs.text import cut_passages
from gated_attention.ranges import require_choice, require_once, require_within
from gated_attention.spec import Site
from gated_attention.train.text.corpus import load_documents

DEFAULT_CONTEXT = 1024
"""Tokens per passage, if the model has as many positions."""

BATCH_TOKENS = {"cpu": 8_192, "cuda": 16_384}
"""Tokens per forward pass."""

_FREQUENT = 1e-3  # smallest share of the text that a listed token makes up


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """Which models are inspected on which text.

    Attributes:
        models: Folders or hub names.
        source, text_field: As `train.text.corpus.load_documents`; for models of images as `images.load_images`.
        num_tokens: Tokens, or patches, that each model reads, about.
        context: Tokens per passage of text; None is `DEFAULT_CONTEXT`, or the model's positions if fewer.
        tokenizer: One for all models; None is each model's own.
        level: As `analysis.inspect_model`.
        ablate: Passages on which each head is replaced by its mean; 0 leaves that out.
    """

    models: tuple[str, ...]
    source: str = "stdlib"
    text_field: str = "text"
    num_tokens: int = 65_536
    context: int | None = None
    tokenizer: str | None = None
    level: Level = "full"
    ablate: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("analyze needs at least one model; give a folder or a hub name")
        require_choice("level", self.level, get_args(Level))
        require_within("tokens", self.num_tokens, least=2, most=2**40)
        require_within("context", self.context, least=2, most=2**30)
        require_within("ablate", self.ablate, least=0, most=2**20)


@dataclass(frozen=True, slots=True)
class TokenGate:
    """Mean gate score of one site for one token, over `count` occurrences."""

    token: str
    token_id: int
    count: int
    mean: float


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """One model's inspection, and what a report prints beside it.

    Attributes:
        label: Unique among the models of one call.
        name: The name that the caller gave.
        family: The configuration's `model_type`.
        excerpt: Texts of the tokens of `inspection.excerpt`.
        massive_tokens: Texts of the tokens of `inspection.massive`, in its order.
        token_gates: Frequent tokens by site, lowest score first.
    """

    label: str
    name: str
    family: str
    num_parameters: int
    num_heads: int
    dtype: str
    device: str
    inspection: Inspection
    excerpt: tuple[str, ...]
    massive_tokens: tuple[str, ...]
    token_gates: dict[Site, tuple[TokenGate, ...]]


Say = Callable[[str], None]
"""Takes a line on what is happening."""

Batches = Sequence[TextBatch | InputBatch]
"""What one model reads."""

Track = Callable[[str, Batches], Iterable[TextBatch | InputBatch]]
"""Takes a model's label and its batches, and yields them as they are read."""


def analyze(
    plan: AnalysisPlan,
    device: torch.device,
    say: Say = lambda message: None,
    track: Track = lambda label, batches: batches,
) -> Iterator[Analysis]:
    """Inspect the models one after the other; every name is checked before the first model is loaded.

    Raises:
        ValueError: if a model or the text cannot be read, or they do not fit together.
    """
    checkpoints = [find_checkpoint(name) for name in plan.models]
    labels = unique_labels(checkpoints)
    say(f"reading {plan.source}")
    documents = cache(lambda: load_documents(plan.source, plan.text_field))
    images = cache(lambda: load_images(plan.source))
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        say(f"loading {checkpoint.name}")
        model = load_any(checkpoint, device)
        find_attention(model)  # refuses an unknown architecture before its text is cut
        tokenizer: PreTrainedTokenizerBase | None = None
        batches: Batches
        if plan.ablate and encoder_of(model) is not None:
            raise ValueError(f"{checkpoint.name} has no next-token loss; --ablate measures causal language models")
        if model.main_input_name == "pixel_values":
            batches = _images(plan, model, checkpoint, device, images())
        elif model.main_input_name == "input_ids":
            tokenizer = find_tokenizer(checkpoint, plan.tokenizer)
            batches = _passages(plan, model, checkpoint, device, documents(), tokenizer)
        else:
            raise ValueError(
                f"{checkpoint.name} reads {model.main_input_name}; analyze reads text and images, "
                "analysis.inspect_model any input"
            )
        inspection = inspect_model(model, track(label, batches), level=plan.level)
        if plan.ablate:
            say(f"ablating heads of {checkpoint.name}")
            inspection = replace(inspection, measures=inspection.measures | _ablation(plan, model, batches))
        yield _described(checkpoint, label, model, tokenizer, inspection)
        del model


def _ablation(plan: AnalysisPlan, model: PreTrainedModel, batches: Batches) -> dict[str, np.ndarray]:
    """The rise of the loss on the last passages, with means from the others."""
    passages = torch.cat([batch.ids for batch in batches if isinstance(batch, TextBatch)])
    size = max(len(next(iter(batch.inputs.values()))) for batch in batches)
    held_out, measured = passages[: -plan.ablate], passages[-plan.ablate :]
    others = [TextBatch(part) for part in torch.split(held_out, size)]
    return mean_ablation(model, [TextBatch(part) for part in torch.split(measured, size)], others)


def _passages(
    plan: AnalysisPlan,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TextBatch]:
    length = _length(plan, model, checkpoint.name)
    batches = cut_passages(
        documents,
        tokenizer,
        length=length,
        num_tokens=plan.num_tokens,
        batch_size=max(1, BATCH_TOKENS[device.type] // length),
        wrapped=encoder_of(model) is not None,
    )
    check_tokenizer(model, max(int(batch.ids.max()) for batch in batches), checkpoint.name)
    if plan.ablate and (number := sum(len(batch.ids) for batch in batches)) <= plan.ablate:
        raise ValueError(
            f"--ablate {plan.ablate} takes the means from other passages, and there are {number} in all; "
            "use more --tokens"
        )
    return batches


def _images(
    plan: AnalysisPlan, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, images: list[Any]
) -> list[InputBatch]:
    if plan.context is not None or plan.tokenizer is not None:
        raise ValueError(f"{checkpoint.name} reads images; leave out --context and --tokenizer, which are of text")
    height, width = image_size(model)
    columns, rows = patch_grid(model, torch.empty(1, 1, height, width))
    length = columns * rows
    return image_batches(
        images,
        model,
        checkpoint.path,
        num_images=max(1, plan.num_tokens // length),
        batch_size=max(1, BATCH_TOKENS[device.type] // length),
    )


def unique_labels(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A label for each, or the caller's name where labels are equal.

    Raises:
        ValueError: if a model is named twice.
    """
    short = [checkpoint.label for checkpoint in checkpoints]
    names = [c.label if short.count(c.label) == 1 else c.name for c in checkpoints]
    require_once("model", names)
    return names


def _length(plan: AnalysisPlan, model: PreTrainedModel, name: str) -> int:
    positions = num_positions(model)
    if plan.context is None:
        return min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
    if positions is not None and plan.context > positions:
        raise ValueError(f"context {plan.context} exceeds the {positions} positions of {name}; use at most that")
    return plan.context


def _described(
    checkpoint: Checkpoint,
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    inspection: Inspection,
) -> Analysis:
    def text(token_id: int) -> str:
        return str(tokenizer.decode([token_id])) if tokenizer else ""

    def token_gates(by_token_id: np.ndarray) -> tuple[TokenGate, ...]:
        sums, counts = by_token_id
        frequent = np.flatnonzero(counts >= max(2, inspection.num_tokens * _FREQUENT))
        gates = [TokenGate(text(int(i)), int(i), int(counts[i]), float(sums[i] / counts[i])) for i in frequent]
        return tuple(sorted(gates, key=lambda gate: gate.mean))

    return Analysis(
        label=label,
        name=checkpoint.name,
        family=model.config.model_type,
        num_parameters=model.num_parameters(),
        num_heads=inspection.measures["f_attn"].shape[1],
        dtype=name_dtype(model),
        device=device_name(model.device),
        inspection=inspection,
        excerpt=tuple(text(int(token_id)) for token_id in inspection.excerpt),
        massive_tokens=tuple(
            text(one.token_id) if tokenizer else inspection.position_name(one.position) for one in inspection.massive
        ),
        token_gates={site: token_gates(gate.by_token_id) for site, gate in inspection.gates.items()},
    )
