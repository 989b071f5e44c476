"""What `adapt` measures of a model, before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from gated_attention.analysis import inspect_model
from gated_attention.evaluate import held_out_loss
from gated_attention.evaluate.length import damage_inside, length_losses
from gated_attention.evaluate.loss import frequency_loss
from gated_attention.evaluate.quantization import Scheme, quantization_losses
from gated_attention.evaluate.rope import Rope, overridden
from gated_attention.evaluate.window import late_loss
from gated_attention.jobs.analyze import BATCH_TOKENS
from gated_attention.train.text.data import PackedData

W8A8 = Scheme(8, 8)
"""Weights by output channel, inputs of linear layers with one scale for a whole tensor, fixed by calibration."""

LONG = 4
"""Contexts of the text on which loss by position is measured."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out text as the measures read it.

    Attributes:
        ids: (N, T), every row opened as in training.
        long_ids: (M, up to 4 T), of consecutive blocks.
        window: As `evaluate.window.without_first_token`.
        yarn: YaRN's factor.
    """

    ids: torch.Tensor
    long_ids: torch.Tensor
    window: int
    yarn: float

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.ids.shape[1]


@dataclass(slots=True)
class Found:
    """Measures of a model as they come; fields as in `adapt_record.Adapted`."""

    measures: dict[str, float]
    by_layer: dict[str, tuple[float, ...]]
    by_position: dict[str, tuple[float, ...]]
    missing: dict[str, str]


def held_out(data: PackedData, *, bos: bool, num_tokens: int, window: int, yarn: float, longest: int) -> HeldOut:
    """About `num_tokens` of the held-out text in blocks, and as many in long sequences of at most `longest` tokens."""
    blocks, start = data.validation, int(bos)
    context = blocks.ids.shape[1]
    ids = torch.cat(blocks.sample(num_tokens).id_batches(64))
    most = min(LONG, max(1, longest // context))
    width, num_blocks = next(
        (context * times, needed)
        for times in range(most, 0, -1)
        if (needed := -(-(context * times - start) // (context - start))) <= len(blocks) or times == 1
    )
    rows = max(1, min(num_tokens // width, len(blocks) // num_blocks))
    firsts = [index * (len(blocks) // rows) for index in range(rows)]
    streams = [blocks.ids[first : first + num_blocks, start:].reshape(-1)[: width - start] for first in firsts]
    long_ids = torch.from_numpy(np.stack(streams).astype(np.int64))
    return HeldOut(ids, torch.cat([ids[:1, :start].expand(rows, -1), long_ids], 1), window, yarn)


def measure_adapted(model: PreTrainedModel, text: HeldOut, device: torch.device, positions: int | None) -> Found:
    """Every measure that the model allows.

    `loss_nats` of all held-out blocks, and `frequency_nats`, that of `evaluate.loss.frequency_loss`; `f_attn`,
    `f_attn_uniform`, `sink_rate` and `m_act` as `analysis` defines them; `w8a8_nats`, the change of the loss under
    W8A8, and `w8a8_loss_nats`; `late_loss_nats` of the tokens that a window of `text.window` tokens cuts off from the
    first, and its changes without the first token (`no_first_nats`) and in that window (`window_nats`); `yarn_nats`,
    the change of the loss inside one context under YaRN.

    Args:
        positions: The positions that the model was trained for; None is the context.
    """
    most = BATCH_TOKENS[device.type]
    batches = list(torch.split(text.ids, max(1, most // text.context)))
    loss = held_out_loss(model, batches)
    inspection = inspect_model(model, batches)
    layered = {"f_attn": "f_attn", "sink_rate": "sink_rate", "m_act": "m_act"}
    found = Found(
        {
            "loss_nats": loss.loss_nats,
            "frequency_nats": frequency_loss(text.ids),
            "num_tokens": loss.num_tokens,
            "f_attn_uniform": inspection.overall("f_attn_uniform"),
        }
        | {name: inspection.overall(name) for name in layered},
        {name: tuple(map(float, inspection.by_layer(name))) for name in layered},
        {},
        {},
    )
    _try(found, "w8a8_nats", partial(_quantise, found, model, text, most))
    _try(found, "window_nats", partial(_hide, found, model, text, most))
    _measure_length(found, model, text, most, positions)
    return found


def _try(found: Found, name: str, measure: Callable[[], Any]) -> None:
    try:
        measure()
    except ValueError as error:
        found.missing[name] = str(error)


def _quantise(found: Found, model: PreTrainedModel, text: HeldOut, most: int) -> None:
    if len(text.ids) < 2:
        raise ValueError("there is one block of held-out text, and calibration takes another; give more text")
    calibrates = torch.arange(len(text.ids)) % 4 == 1
    size = max(1, most // text.context)
    scored, calibration = (torch.split(text.ids[chosen], size) for chosen in (~calibrates, calibrates))
    whole = quantization_losses(model, scored, calibration, (W8A8,), ("tensor-static",), find_worst=False)
    (row,) = whole.rows
    found.measures |= {"w8a8_loss_nats": row.loss_nats, "w8a8_nats": row.change_nats}


def _hide(found: Found, model: PreTrainedModel, text: HeldOut, most: int) -> None:
    whole, no_first, window = (
        late_loss(model, text.ids, text.window, seen, most) for seen in (None, text.context, text.window)
    )
    found.measures |= {"late_loss_nats": whole, "no_first_nats": no_first - whole, "window_nats": window - whole}


def _measure_length(found: Found, model: PreTrainedModel, text: HeldOut, most: int, positions: int | None) -> None:
    longest = text.long_ids.shape[1]
    lengths = list(dict.fromkeys((text.context, longest)))
    plain = length_losses(model, text.long_ids, text.context, lengths, most)
    found.by_position["plain"] = plain[-1].buckets
    rope = Rope(yarn=text.yarn)

    def stretched() -> None:
        with overridden(model, rope, positions or text.context):
            under = length_losses(model, text.long_ids, text.context, lengths, most)
        found.by_position[rope.label] = under[-1].buckets
        found.measures["yarn_nats"] = damage_inside(plain[0], under[0]).nats

    _try(found, "yarn_nats", stretched)
