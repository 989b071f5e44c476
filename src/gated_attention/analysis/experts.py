"""How evenly a mixture of experts spreads tokens over its experts."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.models.experts import count_experts, routers
from gated_attention.nn.evaluating import evaluating


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Where the routers of a model sent tokens.

    Attributes:
        counts: (token, choice) pairs that each expert got, (layers with experts, experts).
        num_tokens: Tokens read.
    """

    counts: np.ndarray
    num_tokens: int

    @property
    def load(self) -> np.ndarray:
        """Each expert's tokens over those of a balanced router, (layers, experts); 1 is balanced."""
        load: np.ndarray = self.counts / self.counts.mean(1, keepdims=True)
        return load

    @property
    def num_dead(self) -> np.ndarray:
        """Experts that no token reached, (layers,)."""
        dead: np.ndarray = (self.counts == 0).sum(1)
        return dead


def expert_load(model: PreTrainedModel, blocks: Iterable[Int[Tensor, "_ t"]]) -> ExpertLoad | None:
    """The load of a model's experts over blocks of token ids; None for a dense model. The model's mode is restored.

    Raises:
        ValueError: if there is nothing to read.
    """
    found = routers(model)
    if not found:
        return None
    num_tokens = 0
    counts = torch.zeros(len(found), model.config.num_experts, dtype=torch.int64)

    def counter(index: int) -> Any:
        def count(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            counts[index] += count_experts(output[2], counts.shape[1])

        return count

    with ExitStack() as stack:
        device = stack.enter_context(evaluating(model))
        counts = counts.to(device)
        for index, router in enumerate(found):
            stack.callback(router.register_forward_hook(counter(index)).remove)
        for block in blocks:
            model(input_ids=block.to(device), use_cache=False, logits_to_keep=1)
            num_tokens += block.numel()
    if num_tokens == 0:
        raise ValueError("there is no text to measure on; give at least one block")
    return ExpertLoad(counts.cpu().numpy(), num_tokens)
