"""The cost of rounding weights and activations to few bits, computed in floating point (fake quantisation)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.evaluate.loss import held_out_loss

Granularity = Literal["tensor-static", "tensor-dynamic", "token"]
"""What shares a scale: all inputs, fixed by calibration; the input of one sequence; or the channels of one token."""

GRANULARITIES = get_args(Granularity)


class Scheme(NamedTuple):
    """Bits per weight and per activation."""

    weight_bits: int
    activation_bits: int

    @property
    def label(self) -> str:
        """As in the literature: W8A8."""
        return f"W{self.weight_bits}A{self.activation_bits}"


SCHEMES = (Scheme(8, 8), Scheme(6, 6), Scheme(4, 8))


class WorstInput(NamedTuple):
    """The input that costs most when nothing else is rounded.

    Attributes:
        name: The linear layer that reads it.
        change_nats: Change of the loss on the first batch.
    """

    name: str
    change_nats: float


@dataclass(frozen=True, slots=True)
class QuantizedLoss:
    """The loss under one scheme; `change_nats` is that minus the loss of the unrounded model on the same tokens.

    Attributes:
        worst: None where it was not asked for.
    """

    scheme: Scheme
    granularity: Granularity
    loss_nats: float
    change_nats: float
    worst: WorstInput | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """The losses under all schemes; `loss_nats` is that of the unrounded model.

    Attributes:
        share: Share of the model's parameters that are weights of the rounded linear layers.
    """

    loss_nats: float
    num_tokens: int
    share: float
    rows: tuple[QuantizedLoss, ...]


def fake_quantize(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    """`x` rounded to the nearest of the `2^bits - 1` symmetric levels `k * scale`, clipped, computed in float32."""
    top = 2 ** (bits - 1) - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    levels = (x.to(wide) / scale.to(wide)).round().clamp(-top, top)
    return (levels * scale.to(wide)).to(x.dtype)


def scale_of(peak: Tensor, bits: int) -> Tensor:
    """The scale that makes the largest magnitude the last level; 1 where everything is zero."""
    return torch.where(peak > 0, peak / (2 ** (bits - 1) - 1), torch.ones_like(peak))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name without the output head, as the literature rounds them; fused experts are not among them.

    Raises:
        ValueError: if there are none, or a weight is packed by a quantiser or offloaded.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers to quantise; leave out the task quantization")
    for name, module in found.items():
        weight = module.weight
        if not (type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta):
            raise ValueError(
                f"the weight of {name} is a {type(weight).__name__} of {weight.dtype} on {weight.device}, which cannot "
                "be rounded; load the model unquantised and into memory, or leave out the task quantization"
            )
    return found


def quantize_weight(module: nn.Module, bits: int) -> Tensor:
    """A layer's weight, rounded with one scale per output channel."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]  # nn.Linear (out, in), Conv1D (in, out)
    peak = weight.abs().amax(dim=0 if isinstance(module, Conv1D) else 1, keepdim=True)
    return fake_quantize(weight, bits, scale_of(peak, bits))


def quantize_activation(x: Tensor, bits: int, granularity: Granularity, calibrated: Tensor) -> Tensor:
    """A layer's input, rounded; `tensor-static` takes the scale from `calibrated`, its largest magnitude elsewhere."""
    if granularity == "token":
        peak = x.abs().amax(-1, keepdim=True)
    elif granularity == "tensor-dynamic":
        peak = x.abs().amax()
    else:
        peak = calibrated
    return fake_quantize(x, bits, scale_of(peak, bits))


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Show every layer's input to `see` and replace it by the result, unless that is None."""

    def hook(name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        out = see(name, args[0])
        return None if out is None else (out, *args[1:])

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.enter_context(module.register_forward_pre_hook(partial(hook, name)))
        yield


@contextmanager
def _rounded_weights(layers: Mapping[str, nn.Module], bits: int) -> Iterator[None]:
    """Put rounded weights in place of the model's own tensors, which come back untouched."""
    own = {name: module.weight for name, module in layers.items()}
    try:
        for module in layers.values():
            module.weight = nn.Parameter(quantize_weight(module, bits), requires_grad=False)
        yield
    finally:
        for name, module in layers.items():
            module.weight = own[name]


def quantization_losses(
    model: nn.Module,
    batches: Sequence[Tensor],
    calibration: Sequence[Tensor],
    schemes: Sequence[Scheme] = SCHEMES,
    granularities: Sequence[Granularity] = GRANULARITIES,
    *,
    find_worst: bool = True,
) -> Quantization:
    """The loss under every scheme and granularity; the model is left exactly as it was.

    Rounding is symmetric and to the nearest: weights once, with a scale per output channel, and inputs of linear layers
    on the fly. Embeddings, norms, attention's products and the output head stay as they are. The worst input is found
    by rounding the input of one layer at a time, with whole weights, on the first batch. It is the one that changes the
    loss most; an error relative to the input's size would hide an outlier.

    Args:
        batches: Text to score, (B, T) ids each; how many at a time changes no number but the worst input's.
        calibration: Other text, from which `tensor-static` takes its ranges.
        find_worst: Whether to find the worst input, which takes a pass over the first batch per linear layer.
    """
    layers = linear_layers(model)
    peaks: dict[str, Tensor] = {}

    def calibrate(name: str, x: Tensor) -> None:
        peak = x.detach().abs().amax()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    def quantize(bits: int, granularity: Granularity, name: str, x: Tensor) -> Tensor:
        return quantize_activation(x, bits, granularity, peaks[name])

    with _seeing(layers, calibrate):
        held_out_loss(model, calibration)
    layers = {name: module for name, module in layers.items() if name in peaks}  # those that the text runs through
    plain = held_out_loss(model, batches)
    plain_first = held_out_loss(model, batches[:1]).loss_nats if find_worst else 0.0
    worst: dict[tuple[int, Granularity], WorstInput] = {}
    rows = []
    for scheme, granularity in product(schemes, granularities):
        round_input = partial(quantize, scheme.activation_bits, granularity)
        by_sequence = granularity == "tensor-dynamic"
        scored = [row for batch in batches for row in torch.split(batch, 1)] if by_sequence else batches
        with _rounded_weights(layers, scheme.weight_bits), _seeing(layers, round_input):
            loss = held_out_loss(model, scored).loss_nats
        place = scheme.activation_bits, granularity
        if find_worst and place not in worst:
            name, loss_first = _find_worst(model, layers, round_input, batches[:1])
            worst[place] = WorstInput(name, loss_first - plain_first)
        rows.append(QuantizedLoss(scheme, granularity, loss, loss - plain.loss_nats, worst.get(place)))
    num_rounded = sum(module.weight.numel() for module in layers.values())  # type: ignore[operator,misc]
    share = num_rounded / sum(parameter.numel() for parameter in model.parameters())
    return Quantization(plain.loss_nats, plain.num_tokens, share, tuple(rows))


def _find_worst(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    round_input: Callable[[str, Tensor], Tensor],
    batches: Sequence[Tensor],
) -> tuple[str, float]:
    """The layer whose rounded input costs the most, and the loss with it."""
    losses = {}
    for name, module in layers.items():
        with _seeing({name: module}, round_input):
            losses[name] = held_out_loss(model, batches).loss_nats
    name = max(losses, key=losses.__getitem__)
    return name, losses[name]
