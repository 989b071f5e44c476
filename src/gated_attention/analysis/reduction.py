"""Measures of a model from the values of each sequence: means over sequences, in float64 on the host."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gated_attention.analysis import measures
from gated_attention.analysis.definitions import GATE_MEASURES, MEASURES, QUANTILES
from gated_attention.analysis.encoders import PositionKind
from gated_attention.spec import GateSpec

SINK_THRESHOLD = 0.3
"""Epsilon of Sink^eps."""

NO_OP_VALUE, BROADCAST_VALUE, BROADCAST_RANK = 0.2, 0.5, 1.5
"""A sink is a no-op up to the first `sink_value`; it broadcasts from the second on and up to that `update_rank`.

They are the bounds of Fesser et al., arXiv 2606.08105, for the sinks of one image.
"""

MAX_MASSIVE = 200
"""Most massive activations in a list."""

Layers = tuple[int, ...]

Collected = dict[str, dict[int, np.ndarray]]
"""Per-sequence values by name and layer, (sequences, ...)."""


class Rows:
    """Per-sequence values by name and layer, kept on the device until they are collected.

    Values of one batch are kept by layer (`of_batch`) until it ends, then as one tensor for all layers of one shape: to
    put hundreds of small tensors together one by one would cost as many launches.
    """

    def __init__(self) -> None:
        self.of_batch: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._rows: dict[tuple[str, Layers], list[Tensor]] = defaultdict(list)
        self._totals: dict[tuple[str, Layers], Tensor] = {}

    def add(self, layer: int, values: Mapping[str, Tensor], prefix: str = "") -> None:
        """Keep values of this batch, (sequences, ...), by their names behind the prefix.

        Raises:
            ValueError: if the layer added to a name before.
        """
        for name, value in values.items():
            if layer in self.of_batch[prefix + name]:
                raise ValueError(f"layer {layer} runs more than once in a pass; this architecture is not supported")
            self.of_batch[prefix + name][layer] = value

    def take(self, names: Iterable[str], prefix: str = "") -> list[tuple[Layers, list[Tensor]]]:
        """Remove what layers added to these names: layers of one shape, and a tensor (layers, ...) per name."""
        parts = [self.of_batch.pop(prefix + name, {}) for name in names]
        groups: dict[Any, list[int]] = defaultdict(list)
        for layer in sorted(parts[0]):
            groups[tuple((part[layer].shape, part[layer].device) for part in parts)].append(layer)
        return [
            (tuple(layers), [torch.stack([part[layer] for layer in layers]) for part in parts])
            for layers in groups.values()
        ]

    def put(self, layers: Layers, values: Mapping[str, Tensor], prefix: str = "") -> None:
        """Keep values of this batch for several layers, (layers, sequences, ...)."""
        for name, value in values.items():
            self._rows[prefix + name, layers].append(value)

    def add_up(self, layers: Layers, name: str, values: Tensor) -> None:
        """Add to a float64 sum for several layers, (layers, ...), which has no axis of sequences."""
        total = self._totals.get((name, layers))
        self._totals[name, layers] = values.double() if total is None else total.add_(values)

    def end_batch(self) -> None:
        """Keep what was not taken."""
        for name in list(self.of_batch):
            for layers, (values,) in self.take([name]):
                self.put(layers, {name: values})

    def collect(self) -> Collected:
        """Everything on the host, by one transfer per name for layers of one shape."""
        whole = {place: torch.cat(parts, dim=1) for place, parts in self._rows.items()} | self._totals
        collected: Collected = defaultdict(dict)
        for (name, layers), values in whole.items():
            collected[name].update(zip(layers, values.cpu().double().numpy(), strict=True))
        return {name: dict(sorted(found.items())) for name, found in collected.items()}


def by_layer(values: Mapping[int, Any], num_layers: int, missing: float = np.nan) -> np.ndarray:
    """One array, (layers, ...), from each layer's values; `missing` where a layer has none or fewer than another."""
    widest = np.max([np.shape(one) for one in values.values()], axis=0)
    table = np.full((num_layers, *widest.astype(int)), missing)
    for layer, one in values.items():
        place: tuple[int | slice, ...] = (layer, *map(slice, np.shape(one)))
        table[place] = one
    return table


def mean_of_numbers(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis without NaN; NaN where there is nothing else. Unlike `np.nanmean` it does not warn."""
    count = (~np.isnan(values)).sum(axis)
    total = np.where(np.isnan(values), 0.0, values).sum(axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


@dataclass(frozen=True, slots=True)
class MassiveActivation:
    """An activation above 100 and above 1000 times the median of its sequence, at one place of one layer.

    Attributes:
        position: The token's position in its sequence.
        value: The largest |hidden state| at this place.
        over_median: That value over the median of its sequence.
        token_id: The token that had it; -1 for a patch or a frame.
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
    collected: Collected,
    num_layers: int,
    length: int,
    starts: np.ndarray,
    ids: np.ndarray,
    positions: Sequence[PositionKind],
) -> tuple[dict[str, np.ndarray], tuple[MassiveActivation, ...]]:
    """Every measure of `definitions.MEASURES` that the rows allow, and the massive activations.

    Args:
        collected: From `Rows.collect`.
        length: Tokens per sequence.
        starts: 1 for a sequence that begins a document, 0 for one inside a document, -1 if unknown.
        ids: Token ids, (sequences, tokens), or without tokens if there are none.
        positions: What each position is; `content` everywhere adds no measures.
    """
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for layer in collected["sums"]:
        rows = {name: layers[layer] for name, layers in collected.items() if layer in layers}
        measured = _sinks(rows, length, starts)
        measured |= {name: values.mean(0) for name, values in rows.items() if name in MEASURES}
        # A head whose output is 0 in one sequence has no rank there.
        measured |= {name: mean_of_numbers(rows[name], axis=0) for name in ("update_rank", "update_constant")}
        measured |= _by_kind(rows, positions)
        if "entropy" in rows:
            measured["peak_elsewhere"] = (rows["peak_position"] != 0).mean(0)
            measured["entropy_uniform"] = np.log(rows["num_seen"]).mean()
        for name, value in measured.items():
            found[name][layer] = value
    names = ("values", "median", "num_massive_tokens")
    values, medians, num_massive = (by_layer(collected[f"activation_{name}"], num_layers) for name in names)
    by_name = (
        {name: by_layer(layers, num_layers) for name, layers in found.items()}
        | {
            "m_act": values[..., 0].max(1),  # of (L, N, n)
            "top_activations": values[..., :3].mean(1),
            "median_activation": medians.mean(1),
            "massive_tokens": num_massive.mean(1),
        }
    )
    return by_name, _massive(collected, values, medians, ids)


def _sinks(found: Mapping[str, np.ndarray], length: int, starts: np.ndarray) -> dict[str, Any]:
    sums, rows = found["sums"], found["first_rows"]  # (N, H, n), (N, H, m)
    looks_ahead = sums.shape[2] == length
    f_attn = sums[..., 0] / length if looks_ahead else (sums[..., 0] - rows[..., 0]) / (length - 1)  # (N, H)
    first = measures.FIRST_QUERIES
    late = length - first
    uniform = (found["sees_first"] / found["num_seen"]).mean(0)  # (T,)
    received = sums / np.maximum(found["seen_by"][:, None, : sums.shape[2]], 1)  # 0 for a key that no query sees
    ratios = found["value_ratios"]  # (N, K, n)
    ratios = ratios.repeat(sums.shape[1] // ratios.shape[1], axis=1)  # (N, H, n)
    of_each = received.argmax(-1)  # (N, H)
    position = of_each if looks_ahead else np.broadcast_to(received.mean(0).argmax(-1), of_each.shape)
    share, value = (np.take_along_axis(one, position[..., None], axis=-1)[..., 0] for one in (received, ratios))
    none = np.full(sums.shape[1], np.nan)
    return {
        "f_attn": f_attn.mean(0),
        "f_attn_late": (sums[..., 0] - rows.sum(-1)).mean(0) / late if late > 0 else none,
        "f_attn_start": f_attn[starts == 1].mean(0) if 1 in starts else none,
        "f_attn_middle": f_attn[starts == 0].mean(0) if 0 in starts else none,
        "sink_rate": (received[..., 0] > SINK_THRESHOLD).mean(0),
        "sink_position": np.array([np.bincount(places).argmax() for places in position.T], dtype=np.float64),
        "sink_share": share.mean(0),
        "sink_value": value.mean(0),
        **_sink_kinds(share, value, found["update_rank"]),
        "f_attn_uniform": (uniform if looks_ahead else uniform[1:]).mean(),
        "f_attn_late_uniform": uniform[first:].mean() if late > 0 else np.nan,
    }


def _sink_kinds(share: np.ndarray, value: np.ndarray, rank: np.ndarray) -> dict[str, np.ndarray]:
    """Share of sequences in which a head has a no-op sink, and a broadcast sink, from values by sequence and head."""
    broadcasts = (value >= BROADCAST_VALUE) & (rank <= BROADCAST_RANK)
    kinds = {"no_op_sink": value <= NO_OP_VALUE, "broadcast_sink": broadcasts}
    return {name: ((share > SINK_THRESHOLD) & fits).mean(0) for name, fits in kinds.items()}


def _by_kind(found: Mapping[str, np.ndarray], positions: Sequence[PositionKind]) -> dict[str, np.ndarray]:
    """Attention to all positions of a kind, and to the strongest of them; nothing where all are of one kind."""
    sums, measured, kinds = found["sums"], dict[str, np.ndarray](), sorted(set(positions))
    if len(kinds) == 1 or sums.shape[-1] < len(positions):  # of causal attention, only the first keys are known
        return measured
    received = sums / np.maximum(found["seen_by"][:, None], 1)
    for kind in kinds:
        places = np.array([one == kind for one in positions])
        measured[f"attention_{kind}"] = (sums[..., places].sum(-1) / len(positions)).mean(0)
        measured[f"strongest_{kind}"] = received[..., places].max(-1).mean(0)
    return measured


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
        token_id = int(ids[sequence, position]) if ids.shape[1] else -1
        places[layer, position, channel].append((float(value), over, token_id))
    listed = [MassiveActivation(*place, *max(seen), len(seen) / len(ids)) for place, seen in places.items()]
    listed.sort(key=lambda one: (-one.share, -one.value))
    return tuple(listed[:MAX_MASSIVE])


@dataclass(frozen=True, slots=True, eq=False)
class GateMeasures:
    """The gates of one site.

    Attributes:
        spec: The gate, from the last layer that has one.
        measures: By name of `definitions.GATE_MEASURES`, (layers, heads); NaN for layers without the gate.
        histogram: Counts per bin, (layers, heads, bins); the end bins count scores outside the edges.
        edges: Edges of the bins, from 0 to `scale` for sigmoids, from -3 to 3 for other activations, (bins + 1,).
        excerpt: Score of each token of `Inspection.excerpt`, averaged over channels, (layers, heads, tokens).
        by_token_id: For every token id the sum of its scores, averaged over channels, heads and layers, and how often
            it occurred, (2, vocabulary).
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
        """The measures of one site's gates from the rows."""
        by_name = {
            name: by_layer({layer: values.mean(0) for layer, values in rows.items()}, num_layers)
            for name in GATE_MEASURES
            if (rows := collected.get(f"{spec.site}_{name}"))
        }
        mean, first = by_name["gate_mean"], by_name["gate_first"]
        by_name["gate_rest"] = first if spec.input == "parameter" else (length * mean - first) / (length - 1)
        excerpts = {layer: values[0].T for layer, values in collected[f"{spec.site}_excerpt"].items()}
        histogram = by_layer(collected[f"{spec.site}_histogram"], num_layers, missing=0.0)
        edges = np.linspace(*measures.score_range(spec), measures.NUM_BINS + 1)
        by_name |= {f"gate_quantile_{q:02d}": _quantile(histogram, edges, q / 100) for q in QUANTILES}
        return cls(spec, by_name, histogram, edges, by_layer(excerpts, num_layers), by_token_id)


def _quantile(histogram: np.ndarray, edges: np.ndarray, share: float) -> np.ndarray:
    """The value below which that share of each histogram lies, linear within a bin; NaN for an empty one."""
    below = np.cumsum(histogram, axis=-1)
    total = below[..., -1:]
    bins = (below < share * total).sum(-1, keepdims=True)  # the first bin that reaches the share
    counts = np.take_along_axis(histogram, bins, axis=-1)
    before = np.take_along_axis(below, bins, axis=-1) - counts
    with np.errstate(divide="ignore", invalid="ignore"):
        value = edges[bins] + (share * total - before) / counts * (edges[1] - edges[0])
    return np.asarray(np.where(total > 0, value, np.nan)[..., 0])
