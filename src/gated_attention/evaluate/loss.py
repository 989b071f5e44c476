"""How well a model predicts held-out text."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean negative log-likelihood of the next token, in nats, over `num_tokens` predictions."""

    loss_nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that overflows."""
        try:
            return exp(self.loss_nats)
        except OverflowError:
            return float("inf")


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Iterable[Tensor]) -> HeldOutLoss:
    """The loss over blocks of token ids, (B, T) each, every block read from its own first token.

    Log-probabilities are formed in float32 and summed in float64. The model's mode is restored.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    training = model.training
    model.eval()
    try:
        for block in blocks:
            input_ids = block.to(device)
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            targets = input_ids[:, 1:]
            # One sequence at a time keeps the float32 copy of the logits small.
            for row, target in zip(logits, targets, strict=True):
                total += F.cross_entropy(row.float(), target, reduction="sum").double()
            num_tokens += targets.numel()
    finally:
        model.train(training)
    return HeldOutLoss(total.item() / num_tokens, num_tokens)
