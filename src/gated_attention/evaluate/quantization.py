"""What rounding weights and activations to few bits costs, computed in floating point (fake quantisation)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gated_attention.evaluate.loss import held_out_loss

Granularity = Literal["tensor-static", "tensor-dynamic", "token"]
"""What shares a scale in an input: everything, fixed by calibration; everything; or one token's channels."""

GRANULARITIES = get_args(Granularity)


class Scheme(NamedTuple):
    """Bits of weights and of activations."""

    weight_bits: int
    activation_bits: int

    @property
    def label(self) -> str:
        """As in the literature: W8A8."""
        return f"W{self.weight_bits}A{self.activation_bits}"


SCHEMES = (Scheme(8, 8), Scheme(6, 6), Scheme(4, 8))


class WorstInput(NamedTuple):
    """The input that costs most when it alone is rounded and nothing else.

    Attributes:
        name: The linear layer that reads it.
        change_nats: Loss change on the first batch.
    """

    name: str
    change_nats: float


@dataclass(frozen=True, slots=True)
class QuantizedLoss:
    """One scheme's loss.

    Attributes:
        change_nats: Loss less that of the unrounded model, on the same tokens.
    """

    scheme: Scheme
    granularity: Granularity
    loss_nats: float
    change_nats: float
    worst: WorstInput


@dataclass(frozen=True, slots=True)
class Quantization:
    """All schemes' losses.

    Attributes:
        share: Share of the model's parameters that lie in the rounded linear layers.
    """

    loss_nats: float
    num_tokens: int
    share: float
    rows: tuple[QuantizedLoss, ...]


def fake_quantize(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Round to the nearest of the `2^bits - 1` symmetric levels `k * scale` and back, clipping beyond; in float32."""
    top = 2 ** (bits - 1) - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    levels = (x.to(wide) / scale.to(wide)).round().clamp(-top, top)
    return (levels * scale.to(wide)).to(x.dtype)


def scale_of(peak: Tensor, bits: int) -> Tensor:
    """The scale at which a largest magnitude is the last level; where everything is zero, 1."""
    return torch.where(peak > 0, peak / (2 ** (bits - 1) - 1), torch.ones_like(peak))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, the output head left out: what the literature rounds. Fused experts are none.

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
    """A layer's weight rounded with one scale per output channel."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]  # nn.Linear (out, in), Conv1D (in, out)
    peak = weight.abs().amax(dim=0 if isinstance(module, Conv1D) else 1, keepdim=True)
    return fake_quantize(weight, bits, scale_of(peak, bits))


def quantize_activation(x: Tensor, bits: int, granularity: Granularity, calibrated: Tensor) -> Tensor:
    """A layer's input rounded; `calibrated` is its largest magnitude elsewhere, which only `tensor-static` uses."""
    if granularity == "token":
        peak = x.abs().amax(-1, keepdim=True)
    elif granularity == "tensor-dynamic":
        peak = x.abs().amax()
    else:
        peak = calibrated
    return fake_quantize(x, bits, scale_of(peak, bits))


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Every layer's input shown to `see`, and replaced by what it returns unless that is None."""

    def hook(name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        out = see(name, args[0])
        return None if out is None else (out, *args[1:])

    handles = [module.register_forward_pre_hook(partial(hook, name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded_weights(layers: Mapping[str, nn.Module], bits: int) -> Iterator[None]:
    """Weights rounded in place of the model's own tensors, which come back untouched."""
    own = {name: module.weight for name, module in layers.items()}
    try:
        for module in layers.values():
            module.weight = nn.Parameter(quantize_weight(module, bits), requires_grad=False)
        yield
    finally:
        for name, module in layers.items():
            module.weight = own[name]


def input_peaks(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude of each layer's input over the calibration text."""
    peaks: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        peak = x.detach().abs().amax()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    with _seeing(layers, see):
        held_out_loss(model, batches)
    return peaks


def quantization_losses(
    model: nn.Module,
    batches: Sequence[Tensor],
    calibration: Sequence[Tensor],
    schemes: Sequence[Scheme] = SCHEMES,
    granularities: Sequence[Granularity] = GRANULARITIES,
) -> Quantization:
    """The loss under every scheme and granularity; the model is left exactly as it was.

    Weights are rounded once per output channel, inputs of linear layers on the fly, symmetrically and to the nearest;
    embeddings, norms, attention's products and the output head stay as they are. The worst input is found by rounding
    one layer's input at a time, weights whole, on the first batch: an error against the input's own size would hide
    an outlier behind itself.

    Args:
        batches: Text that is scored, (B, T) ids each.
        calibration: Other text, from which `tensor-static` takes its ranges.
    """
    layers = linear_layers(model)
    peaks = input_peaks(model, layers, calibration)
    layers = {name: module for name, module in layers.items() if name in peaks}  # those that the text runs through
    plain = held_out_loss(model, batches)
    worst: dict[tuple[int, Granularity], WorstInput] = {}
    rows = []
    for scheme in schemes:
        for granularity in granularities:
            quantize = partial(_quantize_named, bits=scheme.activation_bits, granularity=granularity, peaks=peaks)
            with _rounded_weights(layers, scheme.weight_bits), _seeing(layers, quantize):
                loss = held_out_loss(model, batches).loss_nats
            place = scheme.activation_bits, granularity
            if place not in worst:
                worst[place] = _worst_input(model, layers, quantize, batches[0])
            rows.append(QuantizedLoss(scheme, granularity, loss, loss - plain.loss_nats, worst[place]))
    num_rounded = sum(module.weight.numel() for module in layers.values())  # type: ignore[operator,misc]
    share = num_rounded / sum(parameter.numel() for parameter in model.parameters())
    return Quantization(plain.loss_nats, plain.num_tokens, share, tuple(rows))


def _worst_input(
    model: nn.Module, layers: Mapping[str, nn.Module], quantize: Callable[[str, Tensor], Tensor], batch: Tensor
) -> WorstInput:
    plain = held_out_loss(model, [batch]).loss_nats
    changes = []
    for name, module in layers.items():
        with _seeing({name: module}, quantize):
            changes.append(WorstInput(name, held_out_loss(model, [batch]).loss_nats - plain))
    return max(changes, key=lambda one: one.change_nats)


def _quantize_named(name: str, x: Tensor, bits: int, granularity: Granularity, peaks: Mapping[str, Tensor]) -> Tensor:
    return quantize_activation(x, bits, granularity, peaks[name])
