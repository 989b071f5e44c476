"""Loss against training compute over the sizes and lengths of a study: the slope of each variant, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, log10
from statistics import fmean
from typing import Any

import numpy as np

from gated_attention.sizes import ModelSize, count_flops
from gated_attention.spec import BlockSpec, SwitchSpec, as_gates
from gated_attention.study.grid.rates import Setting
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, paired_difference, percentile_interval, resamples

_SCALES = {"size", "steps"}


@dataclass(frozen=True)
class Scaling:
    """A variant's loss against compute: a least-squares line for each seed, through one point per setting.

    Attributes:
        flops: Training operations of each setting.
        losses: In each setting by seed, at the variant's best learning rate there.
    """

    variant: str
    flops: tuple[float, ...]
    losses: tuple[Mapping[int, float], ...]

    @cached_property
    def slopes(self) -> dict[int, float]:
        """Change of the loss per factor of ten in compute, of the seeds that every setting has, in nats."""
        seeds = sorted(set.intersection(*({s for s, loss in one.items() if isfinite(loss)} for one in self.losses)))
        x = [log10(value) for value in self.flops]
        return {seed: float(np.polyfit(x, [one[seed] for one in self.losses], 1)[0]) for seed in seeds}

    @property
    def slope(self) -> float:
        """The mean over seeds."""
        return fmean(self.slopes.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """From 2.5 to 97.5 % of the slope when seeds are drawn with replacement; None for fewer than two."""
        if len(self.slopes) < 2:
            return None
        values = np.array(list(self.slopes.values()))
        return percentile_interval(values[resamples(len(values))].mean(-1))

    def minus(self, reference: "Scaling") -> PairedDifference:
        """The slope minus the reference's, paired over seeds; below 0 the loss falls faster with compute."""
        return paired_difference(self.slopes, reference.slopes)


def find_scaling(settings: Sequence[Setting]) -> list[Scaling]:
    """Each variant that was trained in all settings of a study of sizes and lengths, the reference first; else none."""
    if len(settings) < 3 or any(not setting.values.keys() <= _SCALES for setting in settings):
        return []
    found = []
    for name in dict.fromkeys(curve.variant for setting in settings for curve in setting.curves):
        curves = [curve for setting in settings for curve in setting.curves if curve.variant == name]
        flops = [training_flops(next(iter(curve.runs[curve.best].values()))) for curve in curves]
        if len(curves) == len(settings) and None not in flops:
            losses = tuple(curve.capped(curve.best) for curve in curves)
            found.append(Scaling(name, tuple(value for value in flops if value is not None), losses))
    return [one for one in found if one.slopes]


def training_flops(result: Result) -> float | None:
    """Floating-point operations of a run's training, its gates' included; None if its record does not say."""
    config = result.config
    size, block, context = config.get("size"), config.get("block"), config.get("data", {}).get("block_size")
    if size is None or block is None or context is None:
        return None
    vocabulary = config.get("model", {}).get("vocab_size", size["vocab_size"])
    shape = replace(ModelSize(**size), vocab_size=vocabulary)
    return float(count_flops(shape, context, _block(block)).total) * result.tokens_seen


def _block(stored: Mapping[str, Any]) -> BlockSpec:
    switch = stored.get("switch")
    return BlockSpec(
        **{**stored, "gates": as_gates(stored.get("gates")), "switch": SwitchSpec(**switch) if switch else None}
    )
