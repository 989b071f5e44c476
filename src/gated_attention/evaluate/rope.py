"""A model under a rotary embedding other than the one it was trained with, by transformers' own `rope_parameters`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gated_attention.ranges import require_within

_FULL = "full_attention"  # the kind of layer that sees the whole context


@dataclass(frozen=True, slots=True)
class Rope:
    """An override of the rotary embedding; `Rope()` changes nothing.

    Attributes:
        theta: RoPE's base; None is the model's.
        yarn: YaRN's factor (arXiv 2309.00071) over the trained length; None is plain RoPE.
    """

    theta: float | None = None
    yarn: float | None = None

    def __post_init__(self) -> None:
        require_within("RoPE's base", self.theta, above=1)
        require_within("YaRN's factor", self.yarn, above=1)

    @property
    def label(self) -> str:
        """Its name in tables."""
        base = [f"base {self.theta:g}"] if self.theta is not None else []
        yarn = [f"YaRN x{self.yarn:g}"] if self.yarn is not None else []
        return ", ".join(base + yarn) or "plain"

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self == Rope()


def override_parameters(config: Any, rope: Rope, length: int) -> dict[str, Any]:
    """The `rope_parameters` of a model under an override; YaRN stretches `length`, the trained length.

    Where kinds of layers have embeddings of their own (Gemma 3), that of `full_attention` is overridden: a sliding
    window does not grow with the context.

    Raises:
        ValueError: if the model has no RoPE, has others per kind of layer, or is stretched already.
    """
    found = getattr(config, "rope_parameters", None)
    if not found:
        raise ValueError(f"{config.model_type} has no rotary embedding; leave out --yarn and --rope-theta")
    if "rope_theta" in found:
        return _override(found, rope, length)
    if not isinstance(found.get(_FULL), dict) or "rope_theta" not in found[_FULL]:
        raise ValueError(
            f"{config.model_type} has a rotary embedding per kind of layer ({', '.join(map(str, found))}), and none of "
            f"{_FULL}; leave out --yarn and --rope-theta"
        )
    return {**found, _FULL: _override(found[_FULL], rope, length)}


def _override(found: dict[str, Any], rope: Rope, length: int) -> dict[str, Any]:
    changed = dict(found)
    if rope.theta is not None:
        changed["rope_theta"] = float(rope.theta)
    if rope.yarn is not None:
        if found.get("rope_type", "default") != "default":
            raise ValueError(
                f"the model's RoPE is {found['rope_type']} already; YaRN takes plain RoPE, leave out --yarn"
            )
        changed |= {"rope_type": "yarn", "factor": float(rope.yarn), "original_max_position_embeddings": length}
    return changed


@contextmanager
def overridden(model: PreTrainedModel, rope: Rope, length: int) -> Iterator[None]:
    """Rebuild the model's rotary embeddings under an override and restore them afterwards; the configuration stays.

    Raises:
        ValueError: as `override_parameters`, whose `length` this takes, or if the rotary embedding is an unusual one.
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
        if all(any(own.endswith(end) for own in dir(child)) for end in ("inv_freq", "attention_scaling"))
    ]
    if not rotary:
        raise ValueError(f"{model.config.model_type}'s rotary embedding is not one of transformers' usual ones")
    try:
        for parent, name, child in rotary:
            # Only the device is the model's: frequencies are float32 whatever its dtype.
            setattr(parent, name, type(child)(changed).to(next(child.buffers()).device))
        yield
    finally:
        for parent, name, child in rotary:
            setattr(parent, name, child)
