"""What a gate adds to each structure of a study, and whether that differs from what it adds to the plain model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gated_attention.study.grid.rates import Curve, Setting
from gated_attention.study.statistics import PairedDifference, paired_difference


@dataclass(frozen=True)
class Addition:
    """A variant with one gate more than another, which has the same structure otherwise, in one setting.

    Attributes:
        gain: Loss of `gated` minus that of `base`, paired over seeds.
        interaction: That difference minus the one in the plain structure, paired over seeds: above 0 the gate adds less
            here. None for the plain structure itself.
    """

    setting: Setting
    base: Curve
    gated: Curve
    gain: PairedDifference
    interaction: PairedDifference | None


def find_additions(settings: Sequence[Setting]) -> list[Addition]:
    """Every gate in every structure of a study whose settings depart from one of them; else none.

    The plain structure is the baseline of the setting that has most in common with the others. A study that crosses
    learning rates, or has no such setting, is not read this way.
    """
    plain = _centre(settings)
    if plain is None or any(len(setting.rates) > 1 for setting in settings):
        return []
    found = [(setting, *pair) for setting in settings for pair in _pairs(setting)]
    gains = {gate: _gain(base, gated) for _, base, gated, gate in found if base is plain.reference}
    additions = []
    for setting, base, gated, gate in found:
        gain, compared = _gain(base, gated), base is not plain.reference and gate in gains
        interaction = paired_difference(gain, gains[gate]) if compared else None
        additions.append(Addition(setting, base, gated, paired_difference(gain, dict.fromkeys(gain, 0.0)), interaction))
    return additions if any(one.interaction for one in additions) else []


def _centre(settings: Sequence[Setting]) -> Setting | None:
    """The setting that shares more values with the others than any other does."""
    shared = [sum(one.values[key] == other.values[key] for other in settings for key in one.values) for one in settings]
    most = max(shared)
    return settings[shared.index(most)] if shared.count(most) == 1 else None


def _pairs(setting: Setting) -> Iterator[tuple[Curve, Curve, str]]:
    """Curves that differ by one gate, and that gate."""
    known = [(curve, *_structure(curve)) for curve in setting.curves]
    for base, structure, gates in known:
        for gated, other, more in known:
            if structure == other and len(more) == len(gates) + 1 and gates < more:
                (gate,) = more - gates
                yield base, gated, gate


def _structure(curve: Curve) -> tuple[str, frozenset[str]]:
    """What a variant is but for its gates and the FFN that makes room for them; and its gates."""
    config: Mapping[str, Any] = next(iter(next(iter(curve.runs.values())).values())).config
    block, size, variant = (dict(config.get(name, {})) for name in ("block", "size", "variant"))
    gates = frozenset(json.dumps(gate, sort_keys=True) for gate in block.pop("gates", ()))
    size.pop("intermediate_size", None)
    rest = [block, size, variant.get("gate_penalty"), config.get("train", {}).get("learning_rate")]
    return json.dumps(rest, sort_keys=True), gates


def _gain(base: Curve, gated: Curve) -> dict[int, float]:
    (before,), (after,) = base.losses.values(), gated.losses.values()
    return {seed: after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())}
