"""Configurations of gated models of any family: the family's own, with gates, under a model type of their own.

The type is what keeps a saved model whole: transformers without this package does not know `gated_llama` and refuses
the folder, where it would load a `llama` and leave its gates out.
"""

import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gated_attention.models.configuration_gated_qwen3 import (
    GatedQwen3Config,
    GatedQwen3MoeConfig,
    gate_tp_plan,
    give_peft_defaults,
)
from gated_attention.spec import GateSpec, as_gates

PREFIX = "gated_"
"""Before a family's model type."""

_STOCK = "stock_"
"""Between the two where `gated_<family>` is a model of this package's own, which has other fields: Qwen3's."""

_OWN = {GatedQwen3Config.model_type, GatedQwen3MoeConfig.model_type}


def gated_type(base: str) -> str:
    """The model type of a family, e.g. `llama`, with gates."""
    return f"{PREFIX}{_STOCK}{base}" if f"{PREFIX}{base}" in _OWN else f"{PREFIX}{base}"


def _base_type(model_type: str) -> str | None:
    """The inverse of `gated_type`; None for any other type."""
    base = model_type.removeprefix(PREFIX).removeprefix(_STOCK)
    return base if gated_type(base) == model_type and base in CONFIG_MAPPING else None


class GatesConfigMixin:
    """Gates, and the layers that have them; put before the configuration of a family.

    Attributes:
        gates: Whatever `as_gates` takes; a tuple of `GateSpec` once assigned.
        gated_layers: Indices of layers; None is all.
        gated_attention: `self`, `cross`, or `all`, where a model has both.
    """

    gates: tuple[GateSpec, ...]
    gated_layers: list[int] | None
    gated_attention: str
    model_type: str
    base_model_tp_plan: dict[str, str] | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "gates":
            value = as_gates(value)
        elif name == "gated_layers" and value is not None:
            value = _indices(value)
        super().__setattr__(name, value)
        plan = type(self).base_model_tp_plan
        if name == "gates" and plan:
            blocks = {key.rpartition(".")[0] for key in plan if key.endswith(".q_proj")}
            added = {f"{block}.{gate}": how for block in blocks for gate, how in gate_tp_plan(value).items()}
            self.base_model_tp_plan = plan | added

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, gates as dictionaries."""
        give_peft_defaults(self.model_type, str(_base_type(self.model_type)))
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**content, "gates": [spec.to_dict() for spec in self.gates]}


@cache
def gated_config(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of a family with gates."""

    class GatedConfig(GatesConfigMixin, base):  # type: ignore[misc]
        model_type = gated_type(base.model_type)

        gates: Any = ()
        gated_layers: Any = None
        gated_attention: str = "all"

    GatedConfig.__name__ = GatedConfig.__qualname__ = f"Gated{base.__name__}"
    GatedConfig.__doc__ = f"`{base.__name__}` with gates; see `GatesConfigMixin`."
    globals()[GatedConfig.__name__] = GatedConfig  # where pickle looks
    if (conversion := get_checkpoint_conversion_mapping(base.model_type)) is not None:
        register_checkpoint_conversion_mapping(GatedConfig.model_type, conversion, overwrite=True)
    return GatedConfig


class _OnDemand(dict[str, Any]):
    """Registered configurations, among them those of `gated_` and any known type, made when they are asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and _base_type(key) is not None)

    def __missing__(self, key: str) -> Any:
        from gated_attention.models.families.add_gates import register  # it needs this module

        base = _base_type(key)
        if base is None:
            raise KeyError(key)
        return register(CONFIG_MAPPING[base])


def make_types_known() -> None:
    """Let `AutoConfig` find the type of every family with gates, without importing any family."""
    if not isinstance(CONFIG_MAPPING._extra_content, _OnDemand):
        CONFIG_MAPPING._extra_content = _OnDemand(CONFIG_MAPPING._extra_content)


def as_layers(layers: Iterable[int] | str | None, config: PreTrainedConfig) -> list[int] | None:
    """Indices of layers from what a caller gives: None for all, indices, or a layer type such as `full_attention`.

    Raises:
        ValueError: if there is no such layer.
    """
    if layers is None:
        return None
    text = config.get_text_config()
    if isinstance(layers, str):
        types = getattr(text, "layer_types", None) or []
        if layers not in types:
            known = ", ".join(dict.fromkeys(types)) or "none"
            raise ValueError(f"no layer is of type {layers!r}; this model has {known}; give indices of layers")
        return [index for index, kind in enumerate(types) if kind == layers]
    return _indices(layers)


def _indices(layers: Any) -> list[int]:
    """Layers in ascending order, each once."""
    found = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if not all(hasattr(layer, "__index__") and not isinstance(layer, bool) for layer in found):
        raise ValueError(f"layers are {layers!r}; give their indices, such as [0, 1]")
    return sorted({operator.index(layer) for layer in found})
