"""A model read under other rotary embeddings than it was trained with, by transformers' own `rope_parameters`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions are turned into angles; `Rope()` is as the model says.

    Attributes:
        theta: RoPE's base; None is the model's.
        yarn: YaRN's factor (arXiv 2309.00071) over the trained length; None is plain RoPE.
    """

    theta: float | None = None
    yarn: float | None = None

    def __post_init__(self) -> None:
        if self.theta is not None and not self.theta > 1:
            raise ValueError(f"RoPE's base is {self.theta:g}; it must be above 1, e.g. 1000000")
        if self.yarn is not None and not self.yarn > 1:
            raise ValueError(f"YaRN's factor is {self.yarn:g}; it must be above 1, e.g. 4")

    @property
    def label(self) -> str:
        """Its name in tables."""
        base = f"base {self.theta:g}" if self.theta is not None else ""
        yarn = f"YaRN x{self.yarn:g}" if self.yarn is not None else ""
        return ", ".join(filter(None, (base, yarn))) or "plain"

    @property
    def is_plain(self) -> bool:
        """Whether nothing is changed."""
        return self == Rope()


def override_parameters(config: Any, rope: Rope, length: int) -> dict[str, Any]:
    """The `rope_parameters` of a model under an override.

    Args:
        length: The trained length, which YaRN stretches.

    Raises:
        ValueError: if the model has no RoPE, has several, or is stretched already.
    """
    found = getattr(config, "rope_parameters", None)
    if not found:
        raise ValueError(f"{config.model_type} has no rotary embedding; leave out --yarn and --rope-theta")
    if "rope_theta" not in found:
        raise ValueError(f"{config.model_type} has a rotary embedding for each kind of layer; overriding is for one")
    changed = dict(found)
    if rope.theta is not None:
        changed["rope_theta"] = float(rope.theta)
    if rope.yarn is not None:
        if found.get("rope_type", "default") != "default":
            raise ValueError(f"the model's RoPE is {found['rope_type']} already; YaRN goes over plain RoPE only")
        changed |= {"rope_type": "yarn", "factor": float(rope.yarn), "original_max_position_embeddings": length}
    return changed


@contextmanager
def overridden(model: PreTrainedModel, rope: Rope, length: int) -> Iterator[None]:
    """The model with its rotary embeddings built anew under an override; restored afterwards, configuration too.

    Args:
        length: The trained length, as in `override_parameters`.

    Raises:
        ValueError: as `override_parameters`.
    """
    if rope.is_plain:
        yield
        return
    changed = copy.deepcopy(model.config)
    changed.rope_parameters = override_parameters(model.config, rope, length)
    changed.max_position_embeddings = max(model.config.max_position_embeddings, int(length * (rope.yarn or 1)))
    rotary = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "inv_freq") and hasattr(child, "attention_scaling")
    ]
    if not rotary:
        raise ValueError(f"{model.config.model_type}'s rotary embedding is not one of transformers' usual ones")
    try:
        for parent, name, child in rotary:
            setattr(parent, name, _rebuilt(child, changed))
        yield
    finally:
        for parent, name, child in rotary:
            setattr(parent, name, child)


def _rebuilt(rotary: nn.Module, config: Any) -> nn.Module:
    fresh = type(rotary)(config)
    device = next(rotary.buffers()).device
    return fresh.to(device)  # frequencies stay float32 whatever the model's dtype
