"""Gates for any transformers model: added to one that is there, or a class that builds, loads and saves with them."""

from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any, TypeVar, cast, get_args

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from gated_attention.models.attention import GateInitialisationMixin, initial_std
from gated_attention.models.families.configuration import PREFIX, GatesConfigMixin, as_layers, gated_config
from gated_attention.models.families.layouts import AttentionKind, find_attention
from gated_attention.models.families.projections import GatedProjectionsMixin, attach, detach, new
from gated_attention.ranges import require_choice
from gated_attention.spec import Gates, GateSpec, as_gates, check_qk_norm

_Model = TypeVar("_Model", bound=PreTrainedModel)


def add_gates(
    model: _Model,
    gates: Gates = GateSpec(),  # noqa: B008  frozen
    layers: Iterable[int] | str | None = None,
    attention: AttentionKind = "all",
) -> _Model:
    """Give a transformers model gates, in place, and return it.

    It becomes an instance of `gated(type(model))`: `save_pretrained` writes a folder of type `gated_<family>`, which
    `from_pretrained` of that class, or of an Auto class once `gated_attention.models` is imported, loads.

    Args:
        model: Any model whose attention goes through transformers' attention interface.
        gates: One gate, or several at different sites. `GateSpec(...).neutral()` starts by changing nothing.
        layers: Indices of layers, or a layer type such as "full_attention"; None is all. Encoder and decoder count
            their layers apart.
        attention: In a model that has both, attention within a sequence (`self`), or to the encoder's (`cross`).

    Raises:
        ValueError: if the model has gates already, the family does not fit, or a gate does not; the model is then as
            it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model; add gates before it is wrapped")
    if isinstance(model, GatedModelMixin) or str(model.config.model_type).startswith(PREFIX):
        raise ValueError(f"{type(model).__name__} has gates already; remove_gates(model) takes them away")
    if not as_gates(gates):
        raise ValueError("no gate is given; give one, e.g. GateSpec(), or several at different sites")
    plain, config = model.config, copy(model.config)
    config.__dict__.pop("model_type", None)  # of a loaded one; the class has the type
    config.__class__ = gated_config(type(plain))  # type: ignore[arg-type]  # of a cached function
    config.gates, config.gated_layers, config.gated_attention = gates, as_layers(layers, plain), attention
    _attach(model, config)
    model.__class__ = gated(type(model))  # type: ignore[arg-type]  # of a cached function
    _exchange_config(model, plain, config)
    return model


def remove_gates(model: _Model) -> _Model:
    """Take away what `add_gates` or `gated` gave, in place; outputs are those of before, to the bit.

    Raises:
        ValueError: if the model has no such gates.
    """
    if not isinstance(model, GatedModelMixin):
        raise ValueError(f"{type(model).__name__} has no gates of add_gates to remove")
    _, *parts = cast(nn.Module, model).modules()
    for module in parts:
        if isinstance(module, GatedProjectionsMixin):
            detach(module)
        elif isinstance(module, GateInitialisationMixin):
            module.__class__ = type(module).__bases__[1]
    gated_configuration = model.config
    plain = copy(gated_configuration)
    for name in ("gates", "gated_layers", "gated_attention", "base_model_tp_plan", "model_type"):
        plain.__dict__.pop(name, None)
    plain.__class__ = type(gated_configuration).__bases__[1]
    model.__class__ = type(model).__bases__[1]
    _exchange_config(model, gated_configuration, plain)
    return model


class GatedModelMixin(GateInitialisationMixin):
    """A model whose configuration says which gates it has."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return new, (gated, type(self).__bases__[1]), self.__dict__

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, GatesConfigMixin):
            kind = type(self).config_class.__name__  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self).__name__} takes a {kind}, which says the gates, not a {type(config).__name__}"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _, *parts = cast(nn.Module, self).modules()
        if config.gates and not any(isinstance(part, GatedModelMixin) for part in parts):  # made by an Auto class
            _attach(cast(PreTrainedModel, self), config)


@cache
def gated(kind: type[_Model]) -> type[_Model]:
    """The class of a transformers model with the gates that its configuration names.

    `gated(LlamaForCausalLM).from_pretrained(folder, gates=GateSpec())` reads a plain Llama and initialises its gates.

    Raises:
        ValueError: if the class is no model of transformers.
    """
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)) or kind.config_class is None:
        raise ValueError(f"{kind!r} is no model class of transformers, e.g. LlamaForCausalLM")
    if issubclass(kind, GateInitialisationMixin):
        raise ValueError(f"{kind.__name__} has gates already")

    class Gated(GatedModelMixin, kind):  # type: ignore[misc, valid-type]
        config_class = gated_config(kind.config_class)

    Gated.__name__ = Gated.__qualname__ = f"Gated{kind.__name__}"
    Gated.__module__ = kind.__module__  # whose source transformers reads to see what the class can do
    Gated.__doc__ = f"`{kind.__name__}` with gates."
    return cast(type[_Model], Gated)


@cache
def register(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration of a family with gates, known to every Auto class that knows the family."""
    config = gated_config(base)  # type: ignore[arg-type]  # of a cached function
    AutoConfig.register(config.model_type, config)
    for auto in vars(modeling_auto).values():
        mapping = (isinstance(auto, type) and getattr(auto, "_model_mapping", None)) or {}
        kind = mapping.get(base, None)
        if isinstance(kind, type) and getattr(kind, "config_class", None) is base:  # else another family's model
            auto.register(config, gated(kind), exist_ok=True)
    if base in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(config, TOKENIZER_MAPPING[base], exist_ok=True)
    return config


def _attach(model: PreTrainedModel, config: Any) -> None:
    """Add the gates of a configuration to the modules they belong to; all of them, or none if one does not fit."""
    require_choice("attention", config.gated_attention, get_args(AttentionKind))
    gates, layers = as_gates(config.gates), config.gated_layers
    found = find_attention(model)
    chosen = [one for one in found if layers is None or one.layer in layers]
    if layers is not None and (missing := set(layers) - {one.layer for one in found}):
        have = sorted({one.layer for one in found if one.layer is not None})
        raise ValueError(f"no attention in layer {min(missing)}; choose from {', '.join(map(str, have))}")
    if config.gated_attention != "all":
        chosen = [one for one in chosen if one.is_cross == (config.gated_attention == "cross")]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no {config.gated_attention}-attention in the chosen layers")
    for one in chosen:
        for spec in gates:
            one.check(spec)
        if hasattr(one.module, "q_norm") or hasattr(one.module, "q_layernorm"):
            check_qk_norm(gates)
    for one in chosen:
        attach(one, gates, initial_std(config), model.dtype)
    for part in model.modules():  # transformers initialises each part of a model by the part's own class
        if isinstance(part, PreTrainedModel) and not isinstance(part, GateInitialisationMixin) and part is not model:
            part.__class__ = _initialising(type(part))  # type: ignore[arg-type]  # of a cached function


@cache
def _initialising(kind: type[nn.Module]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return new, (_initialising, kind), self.__dict__

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduce}
    return type(kind.__name__, (GateInitialisationMixin, kind), names)


def _exchange_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new
