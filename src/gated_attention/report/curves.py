"""Curves over training steps or layers: means, paired differences and smoothing."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Num


class Curve(NamedTuple):
    """One run's values by training step, or by layer."""

    steps: Num[np.ndarray, " n"]
    values: Num[np.ndarray, " n"]

    @property
    def is_finite(self) -> bool:
        """Whether every value is finite."""
        return bool(np.isfinite(self.values).all())


def curve_by_layer(values: Sequence[float] | np.ndarray) -> Curve:
    """The finite values of all layers, first layer first."""
    values = np.asarray(values, dtype=np.float64)
    layers = np.flatnonzero(np.isfinite(values))
    return Curve(layers, values[layers])


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean over the curves that stay finite, at the steps they share; None without any."""
    finite = [curve for curve in curves if len(curve.values) and curve.is_finite]
    if not finite:
        return None
    steps = finite[0].steps
    for curve in finite[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in finite]
    return Curve(steps, np.mean(values, axis=0))


def paired_differences(arms: Mapping[str, Mapping[int, Curve]], reference: str | None) -> dict[str, list[Curve]]:
    """Curves of every other arm minus the reference's with the same seed, at the steps that both have."""
    others = {} if reference is None else arms.get(reference, {})
    found: dict[str, list[Curve]] = {}
    for label, curves in arms.items():
        for seed in sorted(curves.keys() & others.keys()) if label != reference else ():
            steps, ours, theirs = np.intersect1d(curves[seed].steps, others[seed].steps, return_indices=True)
            if len(steps):
                difference = curves[seed].values[ours] - others[seed].values[theirs]
                found.setdefault(label, []).append(Curve(steps, difference))
    return found


def smoothed(curve: Curve) -> Curve:
    """Running mean over 1/25 of the points; the window is cut at both ends."""
    half = len(curve.values) // 50
    if half == 0:
        return curve
    values = [curve.values[max(0, i - half) : i + half + 1].mean() for i in range(len(curve.values))]
    return Curve(curve.steps, np.asarray(values))
