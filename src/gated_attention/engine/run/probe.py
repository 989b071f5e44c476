"""Sinks, massive activations and gates of a model in training: each process measures its share, sums are exchanged."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from olmo_core.distributed.utils import get_local_tensor, is_distributed
from torch import Tensor, distributed, nn

from gated_attention import ops
from gated_attention.engine.mixer import GatedSelfAttention
from gated_attention.ops.sdpa import widen


class Probe:
    """Measures the passes that it watches: `f_attn`, `m_act` and the means of gates, as `analysis` defines them.

    Attributes:
        rows: How many sequences of a pass count, from the first on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks: list[Any] = list(model.blocks.values())  # type: ignore[operator]
        self.rows = 0
        self._names = ["f_attn", *(f"gate_mean_{spec.site}" for spec in self._gates(self._mixers[0]))]
        size, device = (len(self.blocks), len(self._names)), next(model.parameters()).device
        self._sums = torch.zeros(size, dtype=torch.float64, device=device)
        self._counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._largest = torch.zeros(len(self.blocks), device=device)

    @property
    def _mixers(self) -> list[GatedSelfAttention]:
        return [block.attention for block in self.blocks]

    @staticmethod
    def _gates(mixer: GatedSelfAttention) -> list[Any]:
        return [spec for spec in mixer.gates if spec.input != "lse"]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what runs in here; compiled blocks run uncompiled."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for layer, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(partial(self._see_output, layer)).remove)
                block.attention.watch = partial(self._see_attention, layer)
                stack.callback(setattr, block.attention, "watch", None)
            yield

    def read(self) -> dict[str, list[float]]:
        """Every measure by name, a value per layer, over all processes."""
        if is_distributed():
            distributed.all_reduce(self._sums)
            distributed.all_reduce(self._counts)
            distributed.all_reduce(self._largest, op=distributed.ReduceOp.MAX)
        means = (self._sums / self._counts).T.tolist()
        return {**dict(zip(self._names, means, strict=True)), "m_act": self._largest.tolist()}

    def _see_output(self, layer: int, block: nn.Module, inputs: Any, output: Tensor) -> None:
        states = get_local_tensor(output)[: self.rows]
        if states.numel():
            self._largest[layer] = torch.maximum(self._largest[layer], states.abs().amax().float())

    def _see_attention(self, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        _, lse = ops.attention(q, k, v, mask=mask)  # (B, H, T)
        first = k[:, :, :1].repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, 1, D)
        weights = torch.exp((widen(q) * widen(first)).sum(-1) * q.shape[-1] ** -0.5 - lse)
        if mask is not None:
            weights = weights.where(mask[..., 0], 0.0)
        mixer = self._mixers[layer]
        scores = [ops.gate_scores(mixer.gate_logits(spec, x), spec) for spec in self._gates(mixer)]
        for place, values in enumerate([weights[:, :, 1:], *scores]):  # the first query sees nothing else
            self._sums[layer, place] += values[: self.rows].double().sum()
            self._counts[layer, place] += values[: self.rows].numel()
