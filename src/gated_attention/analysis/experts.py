"""How evenly a mixture of experts distributes tokens over its experts."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.analysis.batches import NOTHING
from gated_attention.models.experts import routers
from gated_attention.nn.eval_mode import evaluating
from gated_attention.nn.routing import count_experts


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How many tokens the routers of a model sent to each expert.

    Attributes:
        counts: (token, choice) pairs per expert, (layers with experts, experts).
        num_tokens: Tokens read.
    """

    counts: np.ndarray
    num_tokens: int

    @property
    def load(self) -> np.ndarray:
        """Tokens per expert relative to a balanced router, (layers, experts)."""
        return np.asarray(self.counts / self.counts.mean(1, keepdims=True))

    @property
    def num_dead(self) -> np.ndarray:
        """Experts that no token reached, (layers,)."""
        return np.asarray((self.counts == 0).sum(1))


def expert_load(model: PreTrainedModel, blocks: Iterable[Int[Tensor, "_ t"]]) -> ExpertLoad | None:
    """The load of a model's experts over blocks of token ids; None for a dense model. The model's mode is restored.

    Raises:
        ValueError: if there is nothing to read.
    """
    found = routers(model)
    if not found:
        return None
    num_tokens = 0

    def count(row: Tensor, module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        row += count_experts(output[2], len(row))

    with ExitStack() as stack:
        device = stack.enter_context(evaluating(model))
        counts = torch.zeros(len(found), model.config.num_experts, dtype=torch.int64, device=device)
        for router, row in zip(found, counts, strict=True):
            stack.enter_context(router.register_forward_hook(partial(count, row)))
        for block in blocks:
            model(input_ids=block.to(device), use_cache=False, logits_to_keep=1)
            num_tokens += block.numel()
    if num_tokens == 0:
        raise ValueError(NOTHING)
    return ExpertLoad(counts.cpu().numpy(), num_tokens)
