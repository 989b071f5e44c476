"""The loss of a model on held-out text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gated_attention.nn.eval_mode import evaluating
from gated_attention.ops.sdpa import widen


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean negative log-likelihood of the next token, in nats, over `num_tokens` predictions."""

    loss_nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that overflows."""
        return perplexity(self.loss_nats)


def perplexity(loss_nats: float) -> float:
    """The exponential of a loss; infinite where that overflows."""
    try:
        return exp(loss_nats)
    except OverflowError:
        return float("inf")


def token_losses(logits: Float[Tensor, "b t v"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Negative log-likelihood of each target in nats, computed in float32 or wider."""
    pairs = zip(logits, targets, strict=True)  # one sequence at a time, which keeps the wide copy of the logits small
    return torch.stack([F.cross_entropy(widen(row), target, reduction="none") for row, target in pairs])


def next_token_losses(
    model: nn.Module, input_ids: Int[Tensor, "b t"], position_ids: Int[Tensor, "b t"] | None = None
) -> Float[Tensor, "b t-1"]:
    """Loss of every token but the first, given the tokens before it; where positions restart, those of its document."""
    placed = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=input_ids, use_cache=False, **placed).logits[:, :-1]
    return token_losses(logits, input_ids[:, 1:])


def held_out_loss(model: nn.Module, blocks: Iterable[Tensor | Mapping[str, Tensor]]) -> HeldOutLoss:
    """The loss over blocks, each read from its own first token; the model's mode is restored.

    A block is token ids, (B, T), or a mapping of `input_ids` and `position_ids`. Positions that restart keep documents
    apart, as in training with `packing="documents"`. Losses are computed in float32 and summed in float64.
    """
    num_tokens = 0
    with evaluating(model) as device:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for block in blocks:
            given = block if isinstance(block, Mapping) else {"input_ids": block}
            losses = next_token_losses(model, **{name: values.to(device) for name, values in given.items()})
            total += losses.double().sum()
            num_tokens += losses.numel()
    return HeldOutLoss(total.item() / num_tokens, num_tokens)


def frequency_loss(ids: Int[Tensor, "b t"]) -> float:
    """Nats per token of a guess by the frequencies of the tokens alone, which see no other token; in float64."""
    counts = ids[:, 1:].flatten().bincount().double()
    return float(torch.special.entr(counts / counts.sum()).sum())
