"""From what each sequence gave to the measures of a model: means over sequences, in float64 on the host."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gated_attention.analysis import measures
from gated_attention.spec import GateSpec

SINK_THRESHOLD = 0.3
"""Epsilon of Sink^eps."""

QUANTILES = (5, 25, 50, 75, 95)
"""Quantiles of gate scores, in percent."""

MAX_MASSIVE = 200
"""Massive activations that are listed."""

Collected = dict[str, dict[int, np.ndarray]]
"""Per-sequence values by name and layer, (sequences, ...)."""


class Rows:
    """Per-sequence values by name and layer, left on the device until they are collected.

    Those of one batch are kept layer by layer until it ends, then all layers of one shape as one tensor: hundreds of
    small tensors would each cost one launch to put together.
    """

    def __init__(self) -> None:
        self._batch: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._rows: dict[str, dict[tuple[int, ...], list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._totals: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)

    def add(self, name: str, layer: int, values: Tensor) -> None:
        """Keep values of this batch whose first axis is sequences.

        Raises:
            ValueError: if the layer gave them already.
        """
        if layer in self._batch[name]:
            raise ValueError(f"layer {layer} runs more than once in a pass; this architecture is not supported")
        self._batch[name][layer] = values

    def of_batch(self, name: str) -> dict[int, Tensor]:
        """What the layers added since the batch began."""
        return self._batch.get(name, {})

    def take(self, *names: str) -> list[tuple[tuple[int, ...], list[Tensor]]]:
        """Take back what layers added to some names: layers of one shape, and a tensor (layers, ...) of each name."""
        parts = [self._batch.pop(name, {}) for name in names]
        groups: dict[Any, list[int]] = defaultdict(list)
        for layer in sorted(parts[0]):
            groups[tuple((part[layer].shape, part[layer].device) for part in parts)].append(layer)
        return [
            (tuple(layers), [torch.stack([part[layer] for layer in layers]) for part in parts])
            for layers in groups.values()
        ]

    def put(self, name: str, layers: tuple[int, ...], values: Tensor) -> None:
        """Keep values of this batch and of several layers, (layers, sequences, ...)."""
        self._rows[name][layers].append(values)

    def add_up(self, name: str, layers: tuple[int, ...], values: Tensor) -> None:
        """Add to a sum of several layers that has no axis of sequences, (layers, ...)."""
        total = self._totals[name].get(layers)
        self._totals[name][layers] = values.double() if total is None else total.add_(values)

    def end_batch(self) -> None:
        """Keep what is left of the batch."""
        for name in list(self._batch):
            for layers, (values,) in self.take(name):
                self.put(name, layers, values)

    def total(self, name: str, layer: int) -> Tensor:
        """The sum so far."""
        layers = next(layers for layers in self._totals[name] if layer in layers)
        return self._totals[name][layers][layers.index(layer)]

    def layers(self, name: str) -> list[int]:
        """The layers that added to this name in ended batches, in order."""
        return sorted({layer for layers in self._rows.get(name, {}) for layer in layers})

    def collect(self) -> Collected:
        """Everything on the host, with one transfer a name wherever layers have one shape."""
        collected: Collected = {}
        for name, groups in self._rows.items():
            collected[name] = _to_host({layers: torch.cat(parts, dim=1) for layers, parts in groups.items()})
        for name, totals in self._totals.items():
            collected[name] = _to_host(totals)
        return collected


def _to_host(groups: Mapping[tuple[int, ...], Tensor]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for layers, values in groups.items():
        found.update(zip(layers, values.cpu().double().numpy(), strict=True))
    return dict(sorted(found.items()))


def by_heads(values: Mapping[int, np.ndarray], num_layers: int) -> np.ndarray:
    """(layers, heads) from each layer's heads, NaN where a layer has none or fewer than another."""
    table = np.full((num_layers, max(len(heads) for heads in values.values())), np.nan)
    for layer, heads in values.items():
        table[layer, : len(heads)] = heads
    return table


def mean_of_numbers(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis with NaN passed over; NaN where there is nothing else."""
    count = (~np.isnan(values)).sum(axis)
    total = np.where(np.isnan(values), 0.0, values).sum(axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


@dataclass(frozen=True, slots=True)
class MassiveActivation:
    """An activation above 100 and above 1000 times its sequence's median, in one place of one layer.

    Attributes:
        layer, position, channel: Where; the position is the token's in its sequence.
        value: The largest |hidden state| seen there.
        over_median: That value over the median of its sequence.
        token_id: The token that had it.
        share: Share of sequences in which this place is massive.
    """

    layer: int
    position: int
    channel: int
    value: float
    over_median: float
    token_id: int
    share: float


def model_measures(
    collected: Collected, num_layers: int, length: int, starts: np.ndarray, ids: np.ndarray
) -> tuple[dict[str, np.ndarray], tuple[MassiveActivation, ...]]:
    """Every measure of `definitions.MEASURES` that the rows allow, and the massive activations.

    Args:
        collected: From `Rows.collect`.
        num_layers: Decoder layers.
        length: Tokens per sequence.
        starts: 1 for a sequence that begins a document, 0 for one inside of one, -1 where that is not known.
        ids: Token ids, (sequences, tokens).
    """
    heads: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    layers: dict[str, np.ndarray] = defaultdict(lambda: np.full(num_layers, np.nan))
    for layer in collected["sums"]:
        for name, values in _sinks(collected, layer, length, starts).items():
            heads[name][layer] = values
        for name, value in _uniform(collected, layer, length).items():
            layers[name][layer] = value
        for name in ("value_drain", "size_before_gate", "size_after_gate", "sparsity_1e-2", "sparsity_1e-3"):
            heads[name][layer] = collected[name][layer].mean(0)
        for name in ("inf_norm", "kurtosis"):
            layers[name][layer] = collected[name][layer].mean(0)
        if "entropy" in collected:
            heads["entropy"][layer] = collected["entropy"][layer].mean(0)
            heads["peak"][layer] = collected["peak"][layer].mean(0)
            heads["peak_elsewhere"][layer] = (collected["peak_position"][layer] != 0).mean(0)
            layers["entropy_uniform"][layer] = np.log(collected["num_seen"][layer]).mean()
    values = np.stack([collected["activation_values"][layer] for layer in range(num_layers)])  # (L, N, n)
    medians = np.stack([collected["activation_median"][layer] for layer in range(num_layers)])  # (L, N)
    found = {name: by_heads(values, num_layers) for name, values in heads.items()}
    found |= layers
    found["m_act"] = values[..., 0].max(1)
    found["top_activations"] = values[..., :3].mean(1)
    found["median_activation"] = medians.mean(1)
    found["massive_tokens"] = np.stack([collected["massive_tokens"][layer].mean() for layer in range(num_layers)])
    return found, _massive(collected, values, medians, ids)


def _sinks(collected: Collected, layer: int, length: int, starts: np.ndarray) -> dict[str, np.ndarray]:
    sums, rows = collected["sums"][layer], collected["first_rows"][layer]  # (N, H, n), (N, H, m)
    seen = collected["seen_by"][layer][:, None, : sums.shape[2]]  # (N or 1, 1, n)
    f_attn = (sums[..., 0] - rows[..., 0]) / (length - 1)  # (N, H)
    late = length - measures.FIRST_QUERIES
    received = sums / np.maximum(seen, 1)  # (N, H, n); a key that no query sees gets 0
    mean = received.mean(0)
    position = mean.argmax(-1)
    return {
        "f_attn": f_attn.mean(0),
        "f_attn_late": (sums[..., 0] - rows.sum(-1)).mean(0) / late if late > 0 else np.full(sums.shape[1], np.nan),
        "f_attn_start": _mean_or_nan(f_attn[starts == 1]),
        "f_attn_middle": _mean_or_nan(f_attn[starts == 0]),
        "sink_rate": (received[..., 0] > SINK_THRESHOLD).mean(0),
        "sink_position": position.astype(np.float64),
        "sink_share": np.take_along_axis(mean, position[:, None], axis=-1)[:, 0],
    }


def _mean_or_nan(values: np.ndarray) -> np.ndarray:
    return values.mean(0) if len(values) else np.full(values.shape[1], np.nan)


def _uniform(collected: Collected, layer: int, length: int) -> dict[str, float]:
    share = (collected["sees_first"][layer] / collected["num_seen"][layer]).mean(0)  # (T,)
    first = measures.FIRST_QUERIES
    return {
        "f_attn_uniform": float(share[1:].mean()),
        "f_attn_late_uniform": float(share[first:].mean()) if length > first else float("nan"),
    }


def _massive(
    collected: Collected, values: np.ndarray, medians: np.ndarray, ids: np.ndarray
) -> tuple[MassiveActivation, ...]:
    threshold = np.maximum(measures.MASSIVE, measures.MASSIVE_OVER_MEDIAN * medians)
    places: dict[tuple[int, int, int], list[tuple[float, float, int]]] = defaultdict(list)
    for layer, sequence, rank in np.argwhere(values > threshold[..., None]).tolist():
        position = int(collected["activation_tokens"][layer][sequence, rank])
        channel = int(collected["activation_channels"][layer][sequence, rank])
        value, median = values[layer, sequence, rank], medians[layer, sequence]
        over = float(value / median) if median else float("inf")
        places[layer, position, channel].append((float(value), over, int(ids[sequence, position])))
    listed = [MassiveActivation(*place, *max(seen), len(seen) / len(ids)) for place, seen in places.items()]
    listed.sort(key=lambda one: (-one.share, -one.value))
    return tuple(listed[:MAX_MASSIVE])


@dataclass(frozen=True, slots=True, eq=False)
class GateMeasures:
    """The gates of one site.

    Attributes:
        spec: What the gate does, from the last layer that has one.
        measures: By name of `definitions.GATE_MEASURES`, (layers, heads); NaN for layers without the gate.
        histogram: Counts per bin, (layers, heads, bins); scores outside the edges count in the end bins.
        edges: Bin edges, from 0 to `scale` for sigmoids and from -3 to 3 for other activations, (bins + 1,).
        excerpt: Score of each token of `Inspection.excerpt`, averaged over channels, (layers, heads, tokens).
        by_token_id: For every token id the sum of its scores, each averaged over channels, heads and layers, and how
            often it occurred, (2, vocabulary).
    """

    spec: GateSpec
    measures: dict[str, np.ndarray]
    histogram: np.ndarray
    edges: np.ndarray
    excerpt: np.ndarray
    by_token_id: np.ndarray

    def by_layer(self, name: str) -> np.ndarray:
        """A measure averaged over heads, (layers,); NaN where there is no gate."""
        return mean_of_numbers(self.measures[name], axis=-1)

    @classmethod
    def of(
        cls, spec: GateSpec, collected: Collected, num_layers: int, length: int, by_token_id: np.ndarray
    ) -> "GateMeasures":
        """The gates' measures from the rows of one site."""

        def heads(name: str) -> np.ndarray:
            return by_heads({n: rows.mean(0) for n, rows in collected[f"{spec.site}_{name}"].items()}, num_layers)

        mean, first = heads("mean"), heads("first")
        edges = np.linspace(*measures.score_range(spec), measures.NUM_BINS + 1)
        histogram = np.zeros((*mean.shape, measures.NUM_BINS))
        excerpts = {layer: rows[0].T for layer, rows in collected[f"{spec.site}_excerpt"].items()}  # (heads, tokens)
        excerpt = np.full((*mean.shape, len(next(iter(excerpts.values())).T)), np.nan)
        for layer, scores in excerpts.items():
            excerpt[layer, : len(scores)] = scores
            counts = collected[f"{spec.site}_histogram"][layer]
            histogram[layer, : len(counts)] = counts
        reads_nothing = spec.input == "parameter"
        return cls(
            spec,
            {
                "gate_mean": mean,
                "gate_share_below_0.1": heads("below"),
                "gate_share_above_0.9": heads("above"),
                "gate_share_open": heads("open"),
                "gate_first": first,
                "gate_rest": first if reads_nothing else (length * mean - first) / (length - 1),
                **{f"gate_quantile_{q:02d}": _quantile(histogram, edges, q / 100) for q in QUANTILES},
            },
            histogram,
            edges,
            excerpt,
            by_token_id,
        )


def _quantile(histogram: np.ndarray, edges: np.ndarray, share: float) -> np.ndarray:
    """The value below which that share of each histogram lies, linear within a bin; NaN for an empty one."""
    below = np.cumsum(histogram, axis=-1)
    total = below[..., -1:]
    bins = (below < share * total).sum(-1, keepdims=True)  # first bin that reaches the share
    counts = np.take_along_axis(histogram, bins, axis=-1)
    before = np.take_along_axis(below, bins, axis=-1) - counts
    with np.errstate(divide="ignore", invalid="ignore"):
        value = edges[bins] + (share * total - before) / counts * (edges[1] - edges[0])
    return np.asarray(np.where(total > 0, value, np.nan)[..., 0])
