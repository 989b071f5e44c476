"""One pass of a model over its inputs: every measure, accumulated on the device and read once at the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gated_attention.analysis import measures
from gated_attention.analysis.attention import AttentionCall, visible
from gated_attention.analysis.batches import NOTHING, InputBatch, TextBatch
from gated_attention.analysis.capture import Watcher, watch
from gated_attention.analysis.definitions import MEASURES
from gated_attention.analysis.encoders import CONTENT, PositionKind, encoder_of, image_positions, input_name
from gated_attention.analysis.families import (
    Attention,
    find_attention,
    model_layers,
    unmeasured_gates,
    value_and_output_maps,
)
from gated_attention.analysis.gates import Gate
from gated_attention.analysis.reduction import (
    Collected,
    GateMeasures,
    MassiveActivation,
    Rows,
    by_layer,
    mean_of_numbers,
    model_measures,
)
from gated_attention.nn.eval_mode import evaluating
from gated_attention.ranges import require_choice
from gated_attention.spec import GateSpec, Site

Level = Literal["summary", "full"]
"""`summary` costs little beside the forward pass; `full` also computes every attention weight once, in blocks."""

EXCERPT_TOKENS = 160
"""Tokens of the first sequence whose gate scores are kept one by one."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The measures of a model on what it read.

    Attributes:
        num_tokens, num_sequences: Tokens, or patches or frames, and sequences read.
        length: Tokens per sequence.
        attention: Whether a layer has softmax attention, (layers,).
        measures: By name of `definitions.MEASURES`, an array with the axes of that measure; NaN for a layer or a head
            that has none.
        gates: Gate measures by site.
        massive: Massive activations; those of most sequences come first.
        attention_maps: Attention of the first sequence's first queries, averaged over heads, (n, R, R).
        attention_layers: The layers of the maps, (n,).
        excerpt: The first token ids of the first sequence, none without ids; `gates` has the gate scores of each.
        unmeasured_gates: Submodules of attention that are named like a gate and were not measured, by name, with the
            reason.
        looks_ahead: Whether attention looks both ways.
        content: What a position of kind `content` is: token, patch or frame.
        positions: What each position is.
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
    looks_ahead: bool
    content: str
    positions: tuple[PositionKind, ...]

    @property
    def unknown_gates(self) -> tuple[str, ...]:
        """The names of `unmeasured_gates`."""
        return tuple(self.unmeasured_gates)

    def position_name(self, position: int) -> str:
        """What is at a position: `class token`, `register 2`, `patch 17`, counted within its kind."""
        kind = self.positions[position]
        words = {"cls": "class token", "sep": "separator", "content": self.content}.get(kind, kind)
        number = self.positions[:position].count(kind)
        return words if self.positions.count(kind) == 1 else f"{words} {number}"

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
    batches: Iterable[Int[Tensor, "_ t"] | TextBatch | InputBatch],
    *,
    level: Level = "summary",
    map_layers: Sequence[int] | None = None,
    map_size: int = 48,
) -> Inspection:
    """Measure a model over sequences of one length, each read from its own first token, or over images or sound.

    The host waits for the device once, at the end. The model is left as it was.

    Args:
        model: Any model that uses transformers' attention interface; of an encoder-decoder the encoder.
        batches: Token ids, (B, T) each, or other inputs.
        level: Which measures.
        map_layers: Layers whose attention is excerpted; None is the first, the middle and the last with attention.
        map_size: Queries and keys of an excerpt.

    Raises:
        ValueError: if there is nothing to read, lengths differ, the level or a layer of a map is unknown, or the
            architecture is not supported.
    """
    require_choice("level", level, get_args(Level))
    attention = find_attention(model)
    layers = [one.layer for one in attention]
    if map_layers is None:
        map_layers = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    if missing := [layer for layer in map_layers if layer not in layers]:
        raise ValueError(
            f"layer {missing[0]} has no softmax attention to map; choose from {', '.join(map(str, layers))}"
        )
    recorder = _Recorder(model, level, map_layers, map_size)
    with evaluating(model) as device:
        with watch(model, recorder, attention):
            for batch in batches:
                recorder.read(TextBatch(batch) if isinstance(batch, Tensor) else batch, device)
        if not recorder.starts:
            raise ValueError(NOTHING)
        return recorder.result(attention)


class _Recorder(Watcher):
    """Keeps the per-sequence values of every layer on the device, batch by batch."""

    def __init__(self, model: PreTrainedModel, level: Level, map_layers: Sequence[int], map_size: int) -> None:
        self.model, self.level, self.map_layers, self.map_size = model, level, map_layers, map_size
        encoder = encoder_of(model)
        self.reader = model.base_model if encoder is None else encoder
        self.options: dict[str, Any] = {"use_cache": False} if encoder is None else {}
        self.looks_ahead = False
        self.content = "token"
        self.positions: tuple[PositionKind, ...] = ()
        self.length = 0
        self.rows = Rows()
        self.ids: list[Tensor] = []
        self.starts: list[np.ndarray] = []
        self.maps: dict[int, Tensor] = {}
        self.specs: dict[Site, GateSpec] = {}
        self.width = 0
        self.by_token_id: dict[Site, Tensor] = {}

    @property
    def in_first_batch(self) -> bool:
        return len(self.starts) == 1

    def read(self, batch: TextBatch | InputBatch, device: torch.device) -> None:
        """Run the model over a batch and reduce what the layers left."""
        name = input_name(self.model, batch.inputs)
        whole = batch.inputs[name]
        ids, at_start = (batch.ids, batch.at_start) if isinstance(batch, TextBatch) else (None, None)
        if ids is not None:
            self._check_length(ids.shape[1])
            self.ids.append(ids.cpu())
            ids = ids.to(device, non_blocking=True)
        self.starts.append(np.full(len(whole), -1) if at_start is None else at_start.cpu().numpy().astype(int))
        dtype = self.model.dtype
        self.reader(
            **{
                key: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
                for key, value in batch.inputs.items()
            },
            **self.options,
        )
        if self.in_first_batch:
            self.content = CONTENT[name]
            if name == "pixel_values":
                self.positions = image_positions(self.reader, whole, self.length)
            else:
                named = batch.kinds if isinstance(batch, TextBatch) else ()
                self.positions = named or tuple("content" for _ in range(self.length))
        rows = self.rows
        for layers, (sums, first_rows, value_norms, sizes) in rows.take(measures.AttentionRows._fields):
            rows.put(layers, {"sums": sums.sum(2), "first_rows": first_rows, "size_before_gate": sizes.sum(2)})
            ratios = measures.value_ratios(value_norms, sums.shape[-1])
            rows.put(layers, {"value_drain": measures.value_drain(value_norms), "value_ratios": ratios})
        for layers, (shares,) in rows.take(["head_shares"]):
            names = ("size_after_gate", "sparsity_1e-2", "sparsity_1e-3")
            rows.put(layers, dict(zip(names, shares.sum(2).unbind(-1), strict=True)))
        for layers, (outputs,) in rows.take(["outputs"]):
            rows.put(layers, measures.head_updates(outputs)._asdict())
        for layers, (moments,) in rows.take(["moments"]):
            rows.put(layers, {"inf_norm": measures.inf_norm(moments)})
            rows.put(layers, {"kurtosis": measures.kurtosis(moments, self.length * self.width)})
        for layers, parts in rows.take(measures.ActivationRows._fields):
            rows.put(layers, measures.activations(measures.ActivationRows(*parts))._asdict(), "activation_")
        for site in self.specs:
            self._reduce_gates(site, ids)
        rows.end_batch()

    def _check_length(self, length: int) -> None:
        if length < 2:
            raise ValueError(f"sequences have {length} token; attention is measured from 2 on")
        if self.length not in (0, length):
            raise ValueError(f"sequences have {self.length} and {length} tokens; give all one length")
        self.length = length

    def _reduce_gates(self, site: Site, ids: Int[Tensor, "b t"] | None) -> None:
        rows, prefix, means = self.rows, f"{site}_", []
        for layers, (by_token, shares, sampled) in rows.take(measures.GateScores._fields, prefix):
            names = ("gate_share_below_0.1", "gate_share_above_0.9", "gate_share_open")
            rows.put(layers, dict(zip(names, shares.sum(2).unbind(-1), strict=True)), prefix)
            first = by_token[:, :, 0].clone()  # lets the rest be freed
            rows.put(layers, {"gate_mean": by_token.mean(2), "gate_first": first}, prefix)
            rows.add_up(layers, f"{site}_histogram", measures.gate_histograms(sampled, self.specs[site]))
            means.append(by_token.mean(-1))  # (L, B, T)
            if self.in_first_batch:
                tokens = 0 if ids is None else min(EXCERPT_TOKENS, self.length)
                excerpt = by_token[:, :1, :tokens]
                rows.put(layers, {"excerpt": excerpt.expand(-1, 1, tokens, -1).clone()}, prefix)
        for layers, (scores,) in rows.take(["by_channel"], prefix):
            rows.add_up(layers, f"{site}_by_channel", scores)
        if ids is None:
            self.by_token_id.setdefault(site, torch.zeros(2, 0))
            return
        mean = torch.cat(means).mean(0).expand(ids.shape).double().flatten()  # (B * T,)
        num_embeddings = self.model.get_input_embeddings().num_embeddings
        sums = self.by_token_id.setdefault(site, mean.new_zeros(2, num_embeddings))
        sums.index_add_(1, ids.flatten().to(mean.device), torch.stack([mean, torch.ones_like(mean)]))

    def attention(self, call: AttentionCall) -> None:
        layer = call.layer
        self._check_length(call.length)
        self.looks_ahead = not call.causal  # CLIP's text model is an encoder that does not
        self.rows.add(layer, measures.attention_rows(call)._asdict())
        if self.level == "full":
            self.rows.add(layer, measures.whole_attention(call)._asdict())
        if self.in_first_batch or call.mask is not None:
            self.rows.add(layer, visible(call)._asdict())
        if self.in_first_batch and layer in self.map_layers:
            excerpt = slice(0, min(self.map_size, call.length))
            self.maps[layer] = call.weights(excerpt, excerpt)[0].mean(0)

    def heads(self, attention: Attention, heads: Float[Tensor, "b t c"]) -> None:
        sizes = self.rows.of_batch["sizes"].get(attention.layer)
        if sizes is None:
            return  # it mixes tokens by itself, without softmax attention
        split = torch.unflatten(heads, -1, (sizes.shape[-1], -1))  # (B, T, H, D)
        outputs = measures.sampled_outputs(split)
        self.rows.add(attention.layer, {"head_shares": measures.head_shares(split), "outputs": outputs})

    def block_output(self, attention: Attention, output: Float[Tensor, "b t c"]) -> None:
        self.width = output.shape[-1]
        self.rows.add(attention.layer, {"moments": measures.moments(output)})

    def layer_output(self, layer: int, hidden_states: Float[Tensor, "b t c"]) -> None:
        self.rows.add(layer, measures.activation_rows(hidden_states)._asdict())

    def gate(self, attention: Attention, gate: Gate, logits: Float[Tensor, "b t h d"]) -> None:
        site = gate.spec.site
        self.specs[site] = gate.spec
        self.rows.add(attention.layer, measures.gate_scores(logits, gate.spec)._asdict(), f"{site}_")
        if self.level == "full":
            scores = measures.channel_scores(logits, gate.spec)
            self.rows.add(attention.layer, {"by_channel": scores}, f"{site}_")

    def result(self, attention: Sequence[Attention]) -> Inspection:
        collected = self.rows.collect()
        if "sums" not in collected:
            raise ValueError(f"{type(self.model).__name__} does not call attention through transformers' interface")
        num_layers, starts = len(model_layers(self.model)), np.concatenate(self.starts)
        ids = torch.cat(self.ids).numpy() if self.ids else np.zeros((len(starts), 0), int)
        found, massive = model_measures(collected, num_layers, self.length, starts, ids, self.positions)
        if self.level == "full":
            found |= _ranks(attention, collected, num_layers)
        mapped = [layer for layer in self.map_layers if layer in self.maps]
        return Inspection(
            num_tokens=len(starts) * self.length,
            num_sequences=len(starts),
            length=self.length,
            attention=np.isin(np.arange(num_layers), list(collected["sums"])),
            measures=found,
            gates={
                site: GateMeasures.of(spec, collected, num_layers, self.length, self.by_token_id[site].cpu().numpy())
                for site, spec in self.specs.items()
            },
            massive=massive,
            attention_maps=np.stack([self.maps[layer].cpu().numpy() for layer in mapped]).astype(np.float16),
            attention_layers=np.array(mapped),
            excerpt=ids[0, :EXCERPT_TOKENS],
            unmeasured_gates=unmeasured_gates(attention, collected["sums"]),
            looks_ahead=self.looks_ahead,
            content=self.content,
            positions=self.positions,
        )


def _ranks(attention: Sequence[Attention], collected: Collected, num_layers: int) -> dict[str, np.ndarray]:
    """Effective ranks by head, without and with the gates that multiply between W_V and W_O."""
    plain: dict[int, np.ndarray] = {}
    gated: dict[int, np.ndarray] = {}
    for one in attention:
        maps = value_and_output_maps(one)
        if maps is None:
            continue
        w_v, w_o = maps
        plain[one.layer] = measures.effective_rank(w_v, w_o).cpu().numpy()
        between = [gate.spec for gate in one.gates if gate.spec.site in ("sdpa", "value")]
        if between and all(spec.combine == "multiply" for spec in between):
            scores = w_o.new_ones(w_o.shape[0], w_v.shape[1], dtype=torch.float64)  # (H, D)
            for spec in between:
                mean = torch.from_numpy(collected[f"{spec.site}_by_channel"][one.layer]).to(w_o.device)
                heads = scores.shape[0] // mean.shape[0] if spec.site == "value" else 1
                scores = scores * mean.repeat_interleave(heads, dim=0)
            gated[one.layer] = measures.effective_rank(w_v, w_o, scores).cpu().numpy()
    ranks = {"effective_rank": plain, "effective_rank_gated": gated}
    return {name: by_layer(values, num_layers) for name, values in ranks.items() if values}
