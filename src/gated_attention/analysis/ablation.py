"""What a head is worth: the rise of the loss where its output is replaced by its mean."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gated_attention.analysis.attention import AttentionCall
from gated_attention.analysis.batches import InputBatch, TextBatch
from gated_attention.analysis.capture import Watcher, watch
from gated_attention.analysis.families import Attention, find_attention, model_layers
from gated_attention.analysis.reduction import by_layer
from gated_attention.nn.eval_mode import evaluating

Batch = TextBatch | InputBatch

Losses = Callable[[PreTrainedModel, Batch, torch.device], Float[Tensor, " b"]]
"""The loss of each sequence of a batch."""


def next_token_losses(model: PreTrainedModel, batch: Batch, device: torch.device) -> Float[Tensor, " b"]:
    """Mean cross-entropy of each sequence's next tokens."""
    ids = batch.inputs["input_ids"].to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses: Tensor = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def mean_ablation(
    model: PreTrainedModel, batches: Sequence[Batch], others: Sequence[Batch], losses: Losses = next_token_losses
) -> dict[str, np.ndarray]:
    """The measures `ablation` and `ablation_error` of every head, `layer_ablation` and its error of every layer.

    Each head, then all heads of a layer together, is replaced by its mean at each position, as the output projection
    reads it. The model reads `batches` once for each, and once unchanged.

    Args:
        others: Sequences of the same length from which the means are taken, none of them among `batches`.
        losses: What rises.

    Raises:
        ValueError: if either is empty, or a layer runs several times in one pass.
    """
    if not batches or not others:
        raise ValueError("ablation takes the means from other sequences than it measures; give at least one of each")
    found = find_attention(model)
    if len({id(one.module) for one in found}) < len(found):
        raise ValueError(f"{type(model).__name__} runs layers several times in a pass; ablation does not support it")
    with evaluating(model) as device:
        means, num_heads = _means(model, found, others, losses, device)

        def rise(one: Attention | None, head: int | None = None) -> np.ndarray:
            with _replaced(one, means, num_heads, head):
                return np.concatenate([losses(model, batch, device).double().cpu().numpy() for batch in batches])

        plain = rise(None)
        chosen = [one for one in found if one.layer in means]
        of_heads = {
            one.layer: np.stack([rise(one, head) - plain for head in range(num_heads[one.layer])]) for one in chosen
        }
        of_layers = {one.layer: rise(one) - plain for one in chosen}
    measures = {}
    for name, rises in (("ablation", of_heads), ("layer_ablation", of_layers)):
        layers = {layer: values.mean(-1) for layer, values in rises.items()}
        errors = {layer: _standard_error(values) for layer, values in rises.items()}
        measures[name] = by_layer(layers, len(model_layers(model)))
        measures[f"{name}_error"] = by_layer(errors, len(model_layers(model)))
    return measures


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over sequences, the last axis; NaN for a single one."""
    number = values.shape[-1]
    return np.asarray(values.std(-1, ddof=1) / number**0.5 if number > 1 else np.full(values.shape[:-1], np.nan))


class _Means(Watcher):
    """Adds up what output projections read, by layer."""

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.num_heads: dict[int, int] = {}

    def attention(self, call: AttentionCall) -> None:
        self.num_heads[call.layer] = call.q.shape[1]

    def heads(self, attention: Attention, heads: Float[Tensor, "b t c"]) -> None:
        if attention.layer in self.num_heads:
            total = heads.sum(0, dtype=torch.promote_types(heads.dtype, torch.float32))  # (T, C)
            before = self.sums.get(attention.layer)
            self.sums[attention.layer] = total if before is None else before + total


def _means(
    model: PreTrainedModel, found: list[Attention], others: Sequence[Batch], losses: Losses, device: torch.device
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Mean input of each layer's output projection by position, (T, C), and its number of heads."""
    watcher, number = _Means(), 0
    with watch(model, watcher, found):
        for batch in others:
            number += len(losses(model, batch, device))
    return {layer: total / number for layer, total in watcher.sums.items()}, watcher.num_heads


@contextmanager
def _replaced(
    one: Attention | None, means: dict[int, Tensor], num_heads: dict[int, int], head: int | None
) -> Iterator[None]:
    """One head of a layer, or all of them, at its mean; None changes nothing."""
    if one is None:
        yield
        return
    mean, heads = means[one.layer], num_heads[one.layer]

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0].clone()
        split, of_heads = torch.unflatten(x, -1, (heads, -1)), torch.unflatten(mean.to(x.dtype), -1, (heads, -1))
        chosen = slice(None) if head is None else slice(head, head + 1)
        split[..., chosen, :] = of_heads[:, chosen]  # a view of x
        return (x, *inputs[1:])

    handle = one.output_projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
