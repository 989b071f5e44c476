"""Gates in an attention module that others wrote: its forward pass runs as it is, on projections that are gated."""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gated_attention.models.families.layouts import Attention, Layout, widths
from gated_attention.nn.block import GateOwner
from gated_attention.nn.gate import GATE_MODULES, apply_gate, gate_logits, gate_projection, initialise_gate
from gated_attention.spec import BlockSpec, GateSpec, Site

_INPUTS: tuple[Site, ...] = ("query", "key", "value")
"""Sites behind a projection of what attention reads, in the order of a `Layout`."""


def new(make: Callable[..., type[nn.Module]], *args: Any) -> nn.Module:
    """A module of a class that is made when it is needed, for pickle to fill."""
    kind = make(*args)
    return kind.__new__(kind)


class GatedProjectionsMixin(GateOwner):
    """Mixed into the class of an attention module, or of the module that projects its output.

    Its forward pass is the class's own, given a `GatedView` of the module in the module's place.
    """

    gate_layout: Layout
    gate_reads: str
    """The argument of the forward pass that the gates read."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return new, (gated_class, type(self).__bases__[1], self.gate_reads), self.__dict__

    def gated_at(self, site: Site, y: Tensor, x: Tensor) -> Tensor:
        """Channels of all heads, (B, T, H D), or of the output, (B, T, C), gated by what the gate reads, (B, T, C)."""
        spec = next((spec for spec in self.gates if spec.site == site), None)
        if spec is None:
            return y
        heads = y.unsqueeze(-2) if site == "output" else torch.unflatten(y, -1, (-1, self.gate_head_dim))
        module = self.get_submodule(GATE_MODULES[site])
        if flat := x.ndim == 2:  # (T, C), of packed images
            heads, x = heads[None], x[None]
        heads = apply_gate(module, spec, heads, x)
        return torch.flatten(heads[0] if flat else heads, -2)


class GatedView:
    """An attention module during one forward pass, with gates on its projections; everything else is the module's.

    Projections are called as the module holds them at that moment, so that adapters, quantisation and tensor
    parallelism, which replace or wrap them, come before the gate.
    """

    def __init__(self, module: GatedProjectionsMixin, x: Tensor) -> None:
        self.gated_module, self.gate_input, self.heads_are_gated = module, x, False

    def __getattr__(self, name: str) -> Any:
        module = self.gated_module
        layout = module.gate_layout
        if name == layout.output:
            return partial(_project_output, self, getattr(module, name))
        if name == layout.value and layout.packing is not None:
            return partial(_project_packed, module, getattr(module, name))
        if name in (layout.query, layout.key, layout.value):
            return partial(_project, module, getattr(module, name), _INPUTS[layout.index(name)])
        value = getattr(module, name)
        if isinstance(value, MethodType):  # which may project, too
            return partial(getattr(type(module), name), self)
        return value

    @property
    def is_flat(self) -> bool:
        """Whether tokens of all sequences lie in one row, as of packed images."""
        return self.gate_input.ndim == 2

    def gate_heads(self, y: Tensor) -> Tensor:
        """The output of attention, (B, T, H D), gated unless the attention function has done so."""
        return y if self.heads_are_gated else self.gated_module.gated_at("sdpa", y, self.gate_input)

    def take_gate_logits(self, skipped_by: str | None = None) -> Tensor | None:
        """For an attention function that applies the gate itself: logits, (B, T, H, D or 1), if it can, else None.

        Args:
            skipped_by: The attention implementation, if it skips closed gates.

        Raises:
            ValueError: if it skips, and the gate is not one that it can skip.
        """
        module = self.gated_module
        block = BlockSpec(gates=module.gates)
        spec = block.skippable_gate if skipped_by else block.fused_gate
        if skipped_by and any(gate.site == "sdpa" for gate in module.gates) and (spec is None or self.is_flat):
            raise ValueError(
                f"attention implementation {skipped_by!r} skips closed gates, one hard_sigmoid per head, in batches of "
                f"sequences; this block has {block.describe()}: use 'sdpa'"
            )
        if spec is None or self.is_flat:
            return None
        self.heads_are_gated = True
        return gate_logits(module.get_submodule(GATE_MODULES["sdpa"]), spec, self.gate_input, module.gate_head_dim)


def _project(module: GatedProjectionsMixin, projection: nn.Module, site: Site, x: Tensor) -> Tensor:
    return module.gated_at(site, projection(x), x)


def _project_packed(module: GatedProjectionsMixin, projection: nn.Module, x: Tensor) -> Tensor:
    y, layout, width = projection(x), module.gate_layout, module.gate_head_dim
    if layout.packing == "heads":
        heads = torch.unflatten(y, -1, (-1, 3, width)).unbind(-2)
        gated = [module.gated_at(site, torch.flatten(part, -2), x) for site, part in zip(_INPUTS, heads, strict=True)]
        return torch.stack([torch.unflatten(part, -1, (-1, width)) for part in gated], -2).flatten(-3)
    queries = widths(getattr(module, str(layout.output)))[0]
    keys = (y.shape[-1] - queries) // 2
    parts = y.split((queries, keys, keys), -1)
    return torch.cat([module.gated_at(site, part, x) for site, part in zip(_INPUTS, parts, strict=True)], -1)


def _project_output(view: GatedView, projection: nn.Module, y: Tensor) -> Tensor:
    return view.gated_module.gated_at("output", projection(view.gate_heads(y)), view.gate_input)


@cache
def gated_class(kind: type[nn.Module], reads: str) -> type[nn.Module]:
    """The class of a module with gates, under the same name, since tools know modules by their class's name.

    Args:
        reads: The argument of the forward pass that the gates read.
    """
    attend: Callable[..., Any] = kind.forward
    place = list(signature(attend).parameters).index(reads) - 1

    def forward(self: GatedProjectionsMixin, *args: Any, **kwargs: Any) -> Any:
        view = GatedView(self, args[place] if len(args) > place else kwargs[reads])
        result = attend(view, *args, **kwargs)
        if self.gate_layout.output is not None:
            return result
        heads, *rest = result if isinstance(result, tuple) else (result,)
        heads = view.gate_heads(heads)
        return (heads, *rest) if isinstance(result, tuple) else heads

    names = {"forward": forward, "gate_reads": reads, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (GatedProjectionsMixin, kind), names)


def attach(found: Attention, gates: tuple[GateSpec, ...], std: float, dtype: torch.dtype) -> None:
    """Give an attention module its gates, on its device and in its dtype, initialised as their specs say.

    Args:
        dtype: Where the module's weights are quantised.
    """
    inside = tuple(spec for spec in gates if spec.site != "output" or found.layout.output is not None)
    behind = tuple(spec for spec in gates if spec not in inside)
    _attach(
        found, found.module, found.layout, inside, next(iter(signature(found.module.forward).parameters)), std, dtype
    )
    if behind and found.sibling is not None:
        layout = Layout(None, None, None, "dense")
        _attach(found, found.sibling, layout, behind, list(signature(found.sibling.forward).parameters)[1], std, dtype)


def _attach(
    found: Attention,
    module: nn.Module,
    layout: Layout,
    gates: tuple[GateSpec, ...],
    reads: str,
    std: float,
    dtype: torch.dtype,
) -> None:
    weights = list(found.output_projection.parameters())
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point() and weight.itemsize > 1), dtype)
    for spec in gates:
        gate = gate_projection(spec, found.geometry(spec.site))
        module.add_module(GATE_MODULES[spec.site], gate.to(weights[0].device if weights else None, dtype))
        initialise_gate(gate, std)
        gate.train(module.training)
    if gates:
        module.__class__ = gated_class(type(module), reads)  # type: ignore[arg-type]  # of a cached function
        module.gates, module.gate_layout, module.gate_head_dim = gates, layout, found.head_dim  # type: ignore[assignment]


def detach(module: GatedProjectionsMixin) -> None:
    """Take the gates of a module away, and with them its class."""
    for spec in module.gates:
        delattr(module, GATE_MODULES[spec.site])
    for name in ("gates", "gate_layout", "gate_head_dim"):
        delattr(module, name)
    module.__class__ = type(module).__bases__[1]
