"""One pass of a model over text: every measure, accumulated on the device and read once at the end."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.analysis import measures, visible
from gated_attention.analysis.attention import AttentionCall
from gated_attention.analysis.capture import Watcher, watch
from gated_attention.analysis.definitions import MEASURES
from gated_attention.analysis.families import (
    Attention,
    decoder_layers,
    find_attention,
    unmeasured_gates,
    value_and_output_maps,
)
from gated_attention.analysis.gates import Gate
from gated_attention.analysis.measures import effective_rank
from gated_attention.analysis.reduction import (
    GateMeasures,
    MassiveActivation,
    Rows,
    by_heads,
    mean_of_numbers,
    model_measures,
)
from gated_attention.nn.evaluating import evaluating
from gated_attention.spec import GateSpec, Site

Level = Literal["summary", "full"]
"""`summary` costs little beside the forward pass; `full` also forms every attention weight once, block by block."""

EXCERPT_TOKENS = 160
"""Tokens of the first sequence whose gates are kept one by one."""


_Found = measures.AttentionRows | measures.ActivationRows | measures.GateScores
_F = TypeVar("_F", measures.ActivationRows, measures.GateScores)
_HEAD_SHARES = ("size_after_gate", "sparsity_1e-2", "sparsity_1e-3")


class TextBatch(NamedTuple):
    """Token ids of some sequences, and which of them begin at a document's start; None if that is not known."""

    ids: Int[Tensor, "b t"]
    at_start: Bool[Tensor, " b"] | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model does on a text.

    Attributes:
        num_tokens, num_sequences, length: Tokens read, sequences they came in, tokens per sequence.
        attention: Whether a layer has softmax attention, (layers,).
        measures: By name of `definitions.MEASURES`, an array with that measure's axes; NaN for a layer or a head that
            has none.
        gates: Gate measures by site.
        massive: Massive activations, those of most sequences first.
        attention_maps: Attention of the first sequence's first queries, averaged over heads, (n, R, R).
        attention_layers: The layers of the maps, (n,).
        excerpt: The first token ids of the first sequence, whose gate scores `gates` carries one by one.
        unmeasured_gates: Submodules of attention that are named like a gate and were not measured, and why, by name.
    """

    num_tokens: int
    num_sequences: int
    length: int
    attention: np.ndarray
    measures: dict[str, np.ndarray]
    gates: dict[Site, GateMeasures]
    massive: tuple[MassiveActivation, ...]
    attention_maps: np.ndarray
    attention_layers: np.ndarray
    excerpt: np.ndarray
    unmeasured_gates: dict[str, str]

    @property
    def unknown_gates(self) -> tuple[str, ...]:
        """The names of `unmeasured_gates`."""
        return tuple(self.unmeasured_gates)

    def by_layer(self, name: str) -> np.ndarray:
        """A measure averaged over heads, (layers,); NaN where no head has it."""
        return mean_of_numbers(self.measures[name], axis=-1) if self.measures[name].ndim > 1 else self.measures[name]

    def overall(self, name: str) -> float:
        """A measure as one number: averaged over heads, then as `Definition.over_layers` says."""
        layers = self.by_layer(name)
        if MEASURES[name].over_layers == "max":
            return float(np.max(layers, where=~np.isnan(layers), initial=-np.inf))
        return float(mean_of_numbers(layers, axis=0))


def inspect_model(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ t"] | TextBatch],
    *,
    level: Level = "summary",
    map_layers: Sequence[int] | None = None,
    map_size: int = 48,
) -> Inspection:
    """Measure a model over sequences of token ids, all of one length, each read from its own first token.

    The device is waited for once, at the end. Everything about the model is restored.

    Args:
        model: Any decoder-only model of transformers that uses its attention interface.
        batches: Token ids, (B, T) each.
        level: Which measures.
        map_layers: Layers whose attention is excerpted; None is the first, the middle and the last that have any.
        map_size: Queries and keys of an excerpt.

    Raises:
        ValueError: if there is nothing to read, lengths differ, the level or a layer of a map is unknown, or the
            architecture is not supported.
    """
    if level not in get_args(Level):
        raise ValueError(f"unknown level {level!r}; choose from {', '.join(get_args(Level))}")
    attention = find_attention(model)
    layers = [one.layer for one in attention]
    if map_layers is None:
        map_layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    for layer in map_layers:
        if layer not in layers:
            raise ValueError(
                f"layer {layer} has no softmax attention to map; choose from {', '.join(map(str, layers))}"
            )
    recorder = _Recorder(model, level, map_layers, map_size)
    with evaluating(model) as device:
        with watch(model, recorder, attention):
            for given in batches:
                batch = given if isinstance(given, TextBatch) else TextBatch(given)
                recorder.begin(batch)
                input_ids = batch.ids.to(device, non_blocking=True)
                model.base_model(input_ids=input_ids, use_cache=False)
                recorder.end(input_ids)
        if not recorder.ids:
            raise ValueError("there is no text to measure on; give at least one block")
        if not recorder.rows.layers("sums"):
            raise ValueError(f"{type(model).__name__} does not call attention through transformers' interface")
        return recorder.result(attention)


class _Recorder(Watcher):
    """Keeps every layer's per-sequence values on the device, batch by batch."""

    def __init__(self, model: PreTrainedModel, level: Level, map_layers: Sequence[int], map_size: int) -> None:
        self.model, self.level, self.map_size = model, level, map_size
        self.map_layers = list(map_layers)
        self.num_layers = len(decoder_layers(model))
        self.rows = Rows()
        self.ids: list[Tensor] = []
        self.at_start: list[Tensor | None] = []
        self.maps: dict[int, Tensor] = {}
        self.specs: dict[Site, GateSpec] = {}
        self.width = 0
        self.by_token_id: dict[Site, Tensor] = {}

    def begin(self, batch: TextBatch) -> None:
        """A forward pass over this batch follows."""
        if batch.ids.shape[1] < 2:
            raise ValueError(f"sequences have {batch.ids.shape[1]} token; attention is measured from 2 on")
        if self.ids and batch.ids.shape[1] != self.length:
            raise ValueError(f"sequences have {self.length} and {batch.ids.shape[1]} tokens; give all one length")
        self.ids.append(batch.ids.cpu())
        self.at_start.append(batch.at_start)

    @property
    def length(self) -> int:
        return self.ids[0].shape[1]

    def end(self, input_ids: Int[Tensor, "b t"]) -> None:
        """The forward pass over these tokens is over."""
        rows = self.rows
        for layers, (norms,) in rows.take("attention_value_norms"):
            rows.put("value_drain", layers, measures.value_drain(norms))
        for name, of in (("sums", "attention_sums"), ("size_before_gate", "attention_sizes")):
            for layers, (parts,) in rows.take(of):
                rows.put(name, layers, parts.sum(2))
        for layers, (first,) in rows.take("attention_first_rows"):
            rows.put("first_rows", layers, first)
        for layers, (shares,) in rows.take("head_shares"):
            for name, share in zip(_HEAD_SHARES, shares.sum(2).unbind(-1), strict=True):
                rows.put(name, layers, share)
        for layers, (moments,) in rows.take("moments"):
            rows.put("inf_norm", layers, measures.inf_norm(moments))
            rows.put("kurtosis", layers, measures.kurtosis(moments, input_ids.shape[1] * self.width))
        for layers, hidden in self._take("hidden", measures.ActivationRows):
            found = measures.activations(hidden)
            for name in ("values", "tokens", "channels", "median"):
                rows.put(f"activation_{name}", layers, getattr(found, name))
            rows.put("massive_tokens", layers, found.num_massive_tokens)
        for site in self.specs:
            self._end_gates(site, input_ids)
        rows.end_batch()

    def _end_gates(self, site: Site, input_ids: Int[Tensor, "b t"]) -> None:
        rows, by_layer = self.rows, []
        for layers, (by_token, shares, sampled) in self._take(site, measures.GateScores):
            rows.put(f"{site}_mean", layers, by_token.mean(2))
            rows.put(f"{site}_first", layers, by_token[:, :, 0].clone())  # so that the rest can go
            for name, share in zip(("below", "above", "open"), shares.sum(2).unbind(-1), strict=True):
                rows.put(f"{site}_{name}", layers, share)
            rows.add_up(f"{site}_histogram", layers, measures.gate_histograms(sampled, self.specs[site]))
            by_layer.append(by_token.mean(-1))  # (L, B, T)
            if self._is_first:
                excerpt = by_token[:, :1, :EXCERPT_TOKENS]
                tokens = min(EXCERPT_TOKENS, self.length)
                rows.put(f"{site}_excerpt", layers, excerpt.expand(-1, 1, tokens, -1).clone())
        for layers, (scores,) in rows.take(f"{site}_by_channel"):
            rows.add_up(f"{site}_by_channel", layers, scores)
        mean = torch.cat(by_layer).mean(0).expand(input_ids.shape).double()  # (B, T)
        num_embeddings = self.model.get_input_embeddings().num_embeddings
        sums = self.by_token_id.setdefault(site, mean.new_zeros(2, num_embeddings))
        sums.index_add_(
            1, input_ids.flatten().to(mean.device), torch.stack([mean.flatten(), torch.ones_like(mean).flatten()])
        )

    @property
    def _is_first(self) -> bool:
        return len(self.ids) == 1

    def attention(self, call: AttentionCall) -> None:
        add, layer = self.rows.add, call.layer
        self._add("attention", layer, measures.attention_rows(call))
        if self.level == "full":
            whole = measures.whole_attention(call)
            add("entropy", layer, whole.entropy)
            add("peak", layer, whole.peak)
            add("peak_position", layer, whole.peak_position)
        if self._is_first or call.mask is not None:
            add("num_seen", layer, visible.num_seen(call))
            add("sees_first", layer, visible.sees_first(call))
            add("seen_by", layer, visible.seen_by(call))
        if self._is_first and layer in self.map_layers:
            excerpt = slice(0, min(self.map_size, call.length))
            self.maps[layer] = call.weights(excerpt, excerpt)[0].mean(0)

    def heads(self, attention: Attention, heads: Float[Tensor, "b t c"]) -> None:
        sizes = self.rows.of_batch("attention_sizes").get(attention.layer)
        if sizes is None:
            return  # it mixes tokens by itself, without softmax attention
        split = torch.unflatten(heads, -1, (sizes.shape[-1], -1))  # (B, T, H, D)
        self.rows.add("head_shares", attention.layer, measures.head_shares(split))

    def block_output(self, attention: Attention, output: Float[Tensor, "b t c"]) -> None:
        self.width = output.shape[-1]
        self.rows.add("moments", attention.layer, measures.moments(output))

    def layer_output(self, layer: int, hidden_states: Float[Tensor, "b t c"]) -> None:
        self._add("hidden", layer, measures.activation_rows(hidden_states))

    def gate(self, attention: Attention, gate: Gate, logits: Float[Tensor, "b t h d"]) -> None:
        self.specs[gate.site] = gate.spec
        self._add(gate.site, attention.layer, measures.gate_scores(logits, gate.spec))
        if self.level == "full":
            scores = measures.channel_scores(logits, gate.spec)
            self.rows.add(f"{gate.site}_by_channel", attention.layer, scores)

    def _add(self, of: str, layer: int, found: _Found) -> None:
        for name, values in zip(found._fields, found, strict=True):
            self.rows.add(f"{of}_{name}", layer, values)

    def _take(self, of: str, kind: type[_F]) -> Iterator[tuple[tuple[int, ...], _F]]:
        """What layers of one shape added of this kind, their number the first axis."""
        for layers, parts in self.rows.take(*(f"{of}_{name}" for name in kind._fields)):
            yield layers, kind(*parts)

    def result(self, attention: Sequence[Attention]) -> Inspection:
        collected = self.rows.collect()
        mapped = [layer for layer in self.map_layers if layer in self.maps]
        ids = torch.cat(self.ids).numpy()
        has_attention = np.zeros(self.num_layers, dtype=bool)
        has_attention[list(collected["sums"])] = True
        found, massive = model_measures(collected, self.num_layers, self.length, self._starts(), ids)
        if self.level == "full":
            found |= self._ranks(attention)
        by_token_id = {site: sums.cpu().numpy() for site, sums in self.by_token_id.items()}
        return Inspection(
            num_tokens=int(ids.size),
            num_sequences=len(ids),
            length=self.length,
            attention=has_attention,
            measures=found,
            gates={
                site: GateMeasures.of(spec, collected, self.num_layers, self.length, by_token_id[site])
                for site, spec in self.specs.items()
            },
            massive=massive,
            attention_maps=np.stack([self.maps[layer].cpu().numpy() for layer in mapped]).astype(np.float16),
            attention_layers=np.array(mapped),
            excerpt=ids[0, :EXCERPT_TOKENS],
            unmeasured_gates=unmeasured_gates(attention, collected["sums"]),
        )

    def _starts(self) -> np.ndarray:
        """1 where a sequence begins at a document's start, 0 where inside of one, -1 where that is not known."""
        starts = [
            np.full(len(ids), -1) if start is None else start.cpu().numpy().astype(int)
            for ids, start in zip(self.ids, self.at_start, strict=True)
        ]
        return np.concatenate(starts)

    def _ranks(self, attention: Sequence[Attention]) -> dict[str, np.ndarray]:
        """Effective ranks by head, with and without the gates that multiply between W_V and W_O."""
        plain: dict[int, np.ndarray] = {}
        gated: dict[int, np.ndarray] = {}
        for one in attention:
            maps = value_and_output_maps(one.module)
            if maps is None:
                continue
            w_v, w_o = maps
            plain[one.layer] = effective_rank(w_v, w_o).cpu().numpy()
            between = [gate for gate in one.gates if gate.site in ("sdpa", "value")]
            if between and all(gate.spec.combine == "multiply" for gate in between):
                scores = w_o.new_ones(w_o.shape[0], w_v.shape[1], dtype=torch.float64)
                for gate in between:
                    mean = self.rows.total(f"{gate.site}_by_channel", one.layer)
                    heads = scores.shape[0] // mean.shape[0] if gate.site == "value" else 1
                    scores = scores * mean.double().repeat_interleave(heads, dim=0)
                gated[one.layer] = effective_rank(w_v, w_o, scores).cpu().numpy()
        by_layer = {"effective_rank": plain, "effective_rank_gated": gated}
        return {name: by_heads(values, self.num_layers) for name, values in by_layer.items() if values}
