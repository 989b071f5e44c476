"""Attention sinks, massive activations and gate scores, in one streaming pass and without a T x T matrix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention import ops
from gated_attention.analysis.capture import AttentionCall, decoder_layers, observe
from gated_attention.nn import AttentionGate
from gated_attention.spec import GateSpec, Site

NUM_BINS = 50
"""Bins of a gate histogram."""

_BOUNDED = {"sigmoid", "ns_sigmoid", "hard_sigmoid"}
_UNBOUNDED_RANGE = 3.0


@dataclass(frozen=True, slots=True)
class GateMeasures:
    """One site's gate scores, layer by layer; all tokens, heads and channels of a layer count alike.

    Attributes:
        mean: Mean score (the paper's "gate score", Table 4), (layers,).
        share_below, share_above: Share of scores below 0.1 and above 0.9, (layers,).
        histogram: Counts per bin, (layers, NUM_BINS); scores outside the edges count in the end bins.
        edges: Bin edges, from 0 to `scale` for sigmoids and from -3 to 3 for other activations, (NUM_BINS + 1,).
    """

    mean: np.ndarray
    share_below: np.ndarray
    share_above: np.ndarray
    histogram: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model does on a text.

    Attributes:
        num_tokens: Tokens read.
        f_attn: F-Attn (Table 4): attention to a block's first token, averaged over the block's queries but the
            first, which sees nothing else; a share, (layers, heads).
        f_attn_uniform: What F-Attn would be if every query spread its attention evenly.
        m_act: M-Act (Table 4) before its mean over layers: the largest |hidden state| at a layer's output, (layers,).
        gates: Gate scores by site.
        attention_maps: Attention of the first block's first queries, averaged over heads, for some layers, (n, R, R).
        attention_layers: Those layers, (n,).
    """

    num_tokens: int
    f_attn: np.ndarray
    f_attn_uniform: float
    m_act: np.ndarray
    gates: dict[Site, GateMeasures]
    attention_maps: np.ndarray
    attention_layers: np.ndarray


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ t"]],
    *,
    map_layers: Sequence[int] | None = None,
    map_size: int = 48,
) -> Inspection:
    """Measure a model over blocks of token ids, all of one length, each read from its own first token.

    Args:
        model: Any decoder-only model of transformers that uses its attention interface.
        blocks: Token ids.
        map_layers: Layers whose attention is excerpted; None is the first, the middle and the last.
        map_size: Queries and keys of an excerpt.

    Raises:
        ValueError: if there is nothing to read, or attention does not pass through transformers' interface.
    """
    device = next(model.parameters()).device
    num_layers = len(decoder_layers(model))
    sinks = _SinkMeter(num_layers, map_layers or sorted({0, num_layers // 2, num_layers - 1}), map_size)
    activations = _ActivationMeter(num_layers, device)
    gates = _GateMeter(num_layers)
    num_tokens, length = 0, 0
    training = model.training
    model.eval()
    try:
        with observe(model, attention=sinks.see, gate=gates.see, layer_output=activations.see):
            for block in blocks:
                model(input_ids=block.to(device), use_cache=False, logits_to_keep=1)
                num_tokens, length = num_tokens + block.numel(), block.shape[1]
    finally:
        model.train(training)
    if num_tokens == 0:
        raise ValueError("there is no text to measure on; give at least one block")
    if sinks.num_queries == 0:
        raise ValueError(f"{type(model).__name__} does not call attention through transformers' interface")
    return Inspection(
        num_tokens=num_tokens,
        f_attn=sinks.result(),
        f_attn_uniform=float(np.mean(1 / np.arange(2, length + 1))),
        m_act=activations.result(),
        gates=gates.result(),
        attention_maps=sinks.excerpts(),
        attention_layers=np.array(sinks.map_layers),
    )


class _SinkMeter:
    """Attention to token 0: A[i, 0] = exp(scale * q_i . k_0 - LSE_i)."""

    def __init__(self, num_layers: int, map_layers: Sequence[int], map_size: int) -> None:
        self.sums: list[Tensor | None] = [None] * num_layers
        self.map_layers, self.map_size = list(map_layers), map_size
        self.maps: dict[int, Tensor] = {}
        self.num_queries = 0

    def see(self, call: AttentionCall) -> None:
        groups = call.q.shape[1] // call.k.shape[1]
        first_key = call.k[:, :, :1].repeat_interleave(groups, dim=1)  # (B, H, 1, D)
        scores = (call.q.float() * first_key.float()).sum(-1) * call.scale  # (B, H, T)
        weights = torch.exp(scores - call.lse)[..., 1:].double()
        total = weights.sum((0, 2))  # (H,)
        previous = self.sums[call.layer]
        self.sums[call.layer] = total if previous is None else previous + total
        if call.layer == 0:
            self.num_queries += weights.shape[0] * weights.shape[2]
        if call.layer in self.map_layers and call.layer not in self.maps:
            self.maps[call.layer] = self._excerpt(call, groups)

    def _excerpt(self, call: AttentionCall, groups: int) -> Tensor:
        r = self.map_size
        q, lse = call.q[0, :, :r].float(), call.lse[0, :, :r]
        k = call.k[0, :, :r].float().repeat_interleave(groups, dim=0)
        weights = torch.exp(q @ k.transpose(-1, -2) * call.scale - lse[..., None])  # (H, R, R)
        return weights.tril().mean(0)

    def result(self) -> np.ndarray:
        return np.stack([np.asarray(s.cpu()) for s in self.sums if s is not None]) / self.num_queries

    def excerpts(self) -> np.ndarray:
        return np.stack([self.maps[layer].cpu().numpy() for layer in self.map_layers]).astype(np.float16)


class _ActivationMeter:
    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.largest = torch.zeros(num_layers, dtype=torch.float64, device=device)

    def see(self, layer: int, hidden_states: Float[Tensor, "b t c"]) -> None:
        self.largest[layer] = torch.maximum(self.largest[layer], hidden_states.abs().max())

    def result(self) -> np.ndarray:
        return self.largest.cpu().numpy()


class _GateMeter:
    """Per site and layer: sum, counts below and above, histogram, number of scores."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.specs: dict[Site, GateSpec] = {}
        self.totals: dict[tuple[Site, int], Tensor] = {}
        self.histograms: dict[tuple[Site, int], Tensor] = {}

    def see(self, layer: int, gate: AttentionGate, logits: Float[Tensor, "b t f"]) -> None:
        spec = gate.spec
        scores = ops.gate_scores(torch.unflatten(logits, -1, gate.logit_shape), spec).float()
        low, high = _score_range(spec)
        bins = ((scores - low) / (high - low) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        histogram = torch.bincount(bins.flatten(), minlength=NUM_BINS).double()
        totals = torch.stack(
            [
                scores.sum(dtype=torch.float64),
                (scores < 0.1).sum().double(),
                (scores > 0.9).sum().double(),
                torch.tensor(float(scores.numel()), dtype=torch.float64, device=scores.device),
            ]
        )
        key = (spec.site, layer)
        self.specs[spec.site] = spec
        self.totals[key] = self.totals[key] + totals if key in self.totals else totals
        self.histograms[key] = self.histograms[key] + histogram if key in self.histograms else histogram

    def result(self) -> dict[Site, GateMeasures]:
        measures = {}
        for site, spec in self.specs.items():
            layers = [layer for layer in range(self.num_layers) if (site, layer) in self.totals]
            totals = torch.stack([self.totals[site, layer] for layer in layers]).cpu().numpy()  # (layers, 4)
            mean, share_below, share_above = (totals[:, :3] / totals[:, 3:]).T
            measures[site] = GateMeasures(
                mean=mean,
                share_below=share_below,
                share_above=share_above,
                histogram=torch.stack([self.histograms[site, layer] for layer in layers]).cpu().numpy(),
                edges=np.linspace(*_score_range(spec), NUM_BINS + 1),
            )
        return measures


def _score_range(spec: GateSpec) -> tuple[float, float]:
    if spec.activation in _BOUNDED:
        return min(0.0, spec.scale), max(0.0, spec.scale)
    return -_UNBOUNDED_RANGE, _UNBOUNDED_RANGE
