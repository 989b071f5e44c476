"""Means over seeds, paired differences, and when a difference is significant."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite, nan, sqrt
from statistics import fmean, stdev

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Two-sided level at which a paired difference is significant."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over seeds.

    Attributes:
        mean: Over the finite values; NaN if there is none.
        sd: Sample standard deviation of the finite values; None for fewer than two.
        n: Number of finite values.
        num_diverged: Number of other values, which the mean leaves out.
    """

    mean: float
    sd: float | None
    n: int
    num_diverged: int = 0


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation of the finite values, and how many are not finite."""
    values = list(values)
    finite = [value for value in values if isfinite(value)]
    n = len(finite)
    return Spread(fmean(finite) if n else nan, stdev(finite) if n > 1 else None, n, len(values) - n)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean over seeds of (variant minus baseline) of a quantity where lower is better.

    Attributes:
        mean: NaN if no pair is finite.
        standard_error: Of the mean; None for fewer than two pairs.
        n: Pairs in which both values are finite.
        num_lost: Pairs in which one run diverged; the mean leaves them out.
    """

    mean: float
    standard_error: float | None
    n: int
    num_lost: int = 0

    @property
    def t(self) -> float | None:
        """Mean over standard error; None without one, infinite where all pairs have the same difference."""
        if self.standard_error is None:
            return None
        if self.standard_error == 0.0:
            return 0.0 if self.mean == 0.0 else inf if self.mean > 0.0 else -inf
        return self.mean / self.standard_error

    @property
    def half_width(self) -> float | None:
        """Half the width of the mean's t interval; None without a standard error."""
        return None if self.standard_error is None else t_quantile(self.n - 1) * self.standard_error

    @property
    def verdict(self) -> str:
        """The result in words; `better` is a lower value, significant at two-sided 95 % confidence."""
        if self.n == 0:
            return "diverged" if self.num_lost else "no common seed"
        t = self.t
        if t is None:
            return "n = 1: no spread, not evidence"
        if abs(t) <= t_quantile(self.n - 1):
            return "within noise"
        return "better" if t < 0 else "worse"


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference:
    """Difference of two arms, paired by seed; both mappings go from seed to value."""
    differences = spread(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))
    error = None if differences.sd is None else differences.sd / sqrt(differences.n)
    return PairedDifference(differences.mean, error, differences.n, differences.num_diverged)


DRAWS = 10_000
"""Draws of seeds up to which `resamples` counts all."""


def resamples(n: int) -> np.ndarray:
    """Every draw of n seeds with replacement as a row of indices; beyond `DRAWS` of them as many, always the same."""
    if n**n <= DRAWS:
        return np.array(list(product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Between which the middle `CONFIDENCE` of the values of resampled seeds lie."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with this probability: 4.30 for 2 degrees of freedom at 95 %.

    Raises:
        ValueError: if `degrees` is below 1 or `confidence` is not between 0 and 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom are {degrees}; a spread needs at least 1, that is two values")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; choose a probability between 0 and 1, such as 0.95")
    return float(stdtrit(degrees, (1.0 + confidence) / 2.0))
