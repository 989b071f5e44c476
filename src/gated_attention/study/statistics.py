"""Means over seeds, paired differences, and when a difference counts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import atan, cos, fsum, inf, isfinite, nan, pi, sin, sqrt

CONFIDENCE = 0.95
"""Two-sided level at which a paired difference counts as confirmed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over seeds.

    Attributes:
        mean: Over the finite values; NaN if there is none.
        sd: Sample standard deviation of the finite values; None for fewer than two.
        n: How many values are finite.
        num_diverged: How many are not; the mean leaves them out.
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
    if n == 0:
        return Spread(nan, None, 0, len(values))
    mean = fsum(finite) / n
    sd = sqrt(fsum((value - mean) ** 2 for value in finite) / (n - 1)) if n > 1 else None
    return Spread(mean, sd, n, len(values) - n)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean over seeds of (variant minus baseline) of a quantity where less is better.

    Attributes:
        mean: NaN if no pair is finite.
        standard_error: Of the mean; None for fewer than two pairs.
        n: Pairs in which both values are finite.
        num_lost: Pairs in which one diverged; the mean leaves them out.
    """

    mean: float
    standard_error: float | None
    n: int
    num_lost: int = 0

    @property
    def t(self) -> float | None:
        """Mean over standard error; None without one, infinite where all pairs differ alike."""
        if self.standard_error is None:
            return None
        if self.standard_error == 0.0:
            return 0.0 if self.mean == 0.0 else inf if self.mean > 0.0 else -inf
        return self.mean / self.standard_error

    @property
    def half_width(self) -> float | None:
        """Half of the mean's t interval; None without a standard error."""
        return None if self.standard_error is None else t_quantile(self.n - 1) * self.standard_error

    @property
    def verdict(self) -> str:
        """What the pairs say, in words; `better` is a lower value at two-sided 95 % confidence."""
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


def central_probability(t: float, degrees: int) -> float:
    """Probability that |T| <= t >= 0 for Student's T, by its finite series for whole degrees of freedom.

    Raises:
        ValueError: if `degrees` is below 1.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom are {degrees}; a spread needs at least 1, that is two values")
    theta = atan(t / sqrt(degrees))
    odd = degrees % 2
    term = cos(theta) if odd else 1.0
    terms = [term] if degrees > 1 else []
    for k in range(2 + odd, degrees - 1, 2):
        term *= cos(theta) ** 2 * (k - 1) / k
        terms.append(term)
    series = sin(theta) * fsum(terms)
    return 2.0 / pi * (theta + series) if odd else series


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with this probability: 4.30 for 2 degrees of freedom at 95 %.

    Raises:
        ValueError: if `degrees` is below 1 or `confidence` is not between 0 and 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; choose a probability between 0 and 1, such as 0.95")
    low, high = 0.0, 1.0
    while central_probability(high, degrees) < confidence:
        high *= 2.0
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        if central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
