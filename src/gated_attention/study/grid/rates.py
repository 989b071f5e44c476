"""Loss against learning rate: the curve of each variant, its optimum, its sensitivity, and what a larger rate costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isclose, isfinite, log, nan
from pathlib import PurePath
from statistics import fmean
from typing import Any

from gated_attention.registry.architectures import OWN
from gated_attention.study.comparison import LOSS, variant_order
from gated_attention.study.record import UNSAID, Result
from gated_attention.study.statistics import PairedDifference, paired_difference

FACTOR = 4.0
"""The claim is judged at this multiple of the baseline's best learning rate."""

RATE = "learning_rate"

_READ = {
    "size": {"name": "size"},
    "data": {"source": "data", "tokenizer": "tokenizer", "block_size": "context", "bos": "bos", "packing": "packing"},
    "train": {
        key: key
        for key in (
            "steps",
            "batch_size",
            "accumulation",
            "warmup",
            "weight_decay",
            "optimizer",
            "residual",
            "precision",
        )
    },
    "block": {"qk_norm": "qk_norm"},
}
"""What a record says of a point: its part, the part's key, and the key in a study's file."""


@dataclass(frozen=True)
class Curve:
    """One variant at the learning rates of a setting.

    Attributes:
        runs: By rate and seed.
        losses: Validation loss by rate and seed; NaN for a run that ended without a finite one.
        cap: The loss of a uniform guess, which counts in the place of any that is higher or not finite.
        diverged: Rate and seed of runs that ended without a finite loss, or above their loss at a tenth of training.
    """

    variant: str
    runs: Mapping[float, Mapping[int, Result]]
    losses: Mapping[float, Mapping[int, float]]
    cap: float
    diverged: frozenset[tuple[float, int]]

    def capped(self, rate: float) -> dict[int, float]:
        """Losses at a rate by seed, none above the cap."""
        return {seed: min(loss, self.cap) if isfinite(loss) else self.cap for seed, loss in self.losses[rate].items()}

    def mean(self, rate: float) -> float:
        """The mean over seeds of `capped`."""
        return fmean(self.capped(rate).values())

    @cached_property
    def best(self) -> float:
        """The rate of the lowest mean loss, among those with the most seeds."""
        most = max(map(len, self.losses.values()))
        return min((rate for rate, losses in self.losses.items() if len(losses) == most), key=self.mean)

    @property
    def is_at_edge(self) -> bool:
        """Whether the optimum may lie beyond the rates that were tried."""
        return len(self.losses) > 1 and self.best in (min(self.losses), max(self.losses))

    def rise(self, low: float, high: float) -> dict[int, float]:
        """Loss at the higher rate minus that at the lower, by seed."""
        before, after = self.capped(low), self.capped(high)
        return {seed: after[seed] - before[seed] for seed in before.keys() & after.keys()}

    def sensitivity(self, rates: Sequence[float]) -> dict[int, float]:
        """Mean over rates of the loss minus the best loss, by seed (Wortsman et al., arXiv 2309.14322)."""
        by_rate = [self.capped(rate) for rate in rates]
        seeds = set.intersection(*map(set, by_rate)) if by_rate else set()
        found = {seed: [losses[seed] for losses in by_rate] for seed in sorted(seeds)}
        return {seed: fmean(losses) - min(losses) for seed, losses in found.items()}

    def values(self, name: str, rate: float) -> dict[int, float]:
        """A measure at a rate by seed, of the runs that have it and a finite loss."""
        losses = self.losses[rate]
        runs = {seed: run for seed, run in self.runs[rate].items() if name in run.measures and isfinite(losses[seed])}
        return {seed: run.measures[name].value for seed, run in runs.items()}


@dataclass(frozen=True)
class Setting:
    """The curves of all variants that share everything but the learning rate, the reference first.

    Attributes:
        values: What the setting has that others of the study have not, by key of a study's file.
    """

    values: Mapping[str, Any]
    curves: tuple[Curve, ...]

    @property
    def label(self) -> str:
        """The values in words; empty for the only setting."""
        words = {"qk_norm": "QK-norm", "bos": "BOS"}
        return ", ".join(
            f"{words.get(key, key.replace('_', ' '))} {value_text(self.values[key])}" for key in self.values
        )

    @property
    def reference(self) -> Curve:
        """The baseline, or the first variant."""
        return self.curves[0]

    @cached_property
    def rates(self) -> list[float]:
        """All learning rates, ascending."""
        return sorted({rate for curve in self.curves for rate in curve.losses})

    @cached_property
    def common_rates(self) -> list[float]:
        """The rates at which every variant has all of the study's seeds."""
        seeds = {seed for curve in self.curves for losses in curve.losses.values() for seed in losses}
        return [rate for rate in self.rates if all(curve.losses.get(rate, {}).keys() == seeds for curve in self.curves)]

    @cached_property
    def high(self) -> float | None:
        """The rate at `FACTOR` times the reference's best; None if nothing was trained there."""
        wanted = FACTOR * self.reference.best
        return next((rate for rate in self.rates if isclose(rate, wanted, rel_tol=0.01)), None)

    def claim(self, curve: Curve) -> PairedDifference | None:
        """How much more a variant's loss rises than the reference's between the reference's best rate and `high`.

        Below 0 the variant tolerates the larger rate better. None without runs at both.
        """
        low, high = self.reference.best, self.high
        needed = [one.losses for one in (curve, self.reference)]
        if high is None or any(low not in losses or high not in losses for losses in needed):
            return None
        return paired_difference(curve.rise(low, high), self.reference.rise(low, high))


def find_settings(results: Iterable[tuple[Result, Sequence[Mapping[str, Any]]]]) -> list[Setting]:
    """The settings of a study, from its results and the lines of their `metrics.jsonl`."""
    runs = [(point_of(result), result, metrics) for result, metrics in results]
    varied: list[str] = []  # without keys that follow from those before them, such as a size's own context
    for key in runs[0][0]:
        counts = [len({_values(point, keys) for point, *_ in runs}) for keys in (varied, [*varied, key])]
        if key != RATE and counts[1] > counts[0]:
            varied.append(key)
    groups: dict[tuple[str, ...], list[Any]] = {}
    for point, result, metrics in runs:
        groups.setdefault(_values(point, varied), []).append((point, result, metrics))
    settings = []
    for group in groups.values():
        names = variant_order(result for _, result, _ in group)
        curves = [_curve(name, [one for one in group if one[1].variant == name]) for name in names]
        settings.append(Setting({key: group[0][0][key] for key in varied}, tuple(curves)))
    return sorted(settings, key=lambda setting: [_rank(value) for value in setting.values.values()])


def point_of(result: Result) -> dict[str, Any]:
    """What a study's file says of a run, by its keys."""
    config, unsaid = result.config, {**UNSAID, "packing": "stream"}
    found = {
        name: config.get(part, {}).get(key, unsaid.get(name))
        for part, keys in _READ.items()
        for key, name in keys.items()
    }
    return {
        "architecture": config.get("architecture", OWN),
        **found,
        RATE: config.get("study_learning_rate", config.get("train", {}).get(RATE)),
    }


def value_text(value: Any) -> str:
    """A setting's value in a sentence."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else f"{value:,}"
    return PurePath(str(value)).name if PurePath(str(value)).is_absolute() else str(value)


def _values(point: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(point[key]) for key in keys)


def _curve(variant: str, group: Sequence[tuple[Mapping[str, Any], Result, Sequence[Mapping[str, Any]]]]) -> Curve:
    runs: dict[float, dict[int, Result]] = {}
    diverged = set()
    for point, result, metrics in sorted(group, key=lambda one: (one[0][RATE], one[1].seed)):
        if result.seed in runs.setdefault(point[RATE], {}):
            raise ValueError(f"two results of {variant} seed {result.seed} at learning rate {point[RATE]:g}; keep one")
        runs[point[RATE]][result.seed] = result
        if not isfinite(_loss(result)) or _ended_above_a_tenth(metrics):
            diverged.add((point[RATE], result.seed))
    losses = {rate: {seed: _loss(run) for seed, run in found.items()} for rate, found in runs.items()}
    vocabulary = group[0][1].config.get("model", {}).get("vocab_size")
    return Curve(variant, runs, losses, log(vocabulary) if vocabulary else inf, frozenset(diverged))


def _loss(result: Result) -> float:
    found = result.measures.get(LOSS)
    return found.value if found else nan


def _ended_above_a_tenth(metrics: Sequence[Mapping[str, Any]]) -> bool:
    points = [(line["step"], line[LOSS]) for line in metrics if line.get(LOSS) is not None]
    if not points:
        return False
    last, end = points[-1]
    early = next(loss for step, loss in points if step >= last / 10)
    return not end <= early


def _rank(value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, int | float)
    return is_number, value if is_number else str(value)
