"""What the records of `adapt` say: each arm over its seeds, and against the reference, by one rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from gated_attention.jobs.adapt_record import ORIGINAL, Adapted
from gated_attention.study.statistics import PairedDifference, Spread, paired_difference, spread

CONTROL = "control"
"""The arm that the others are compared with, if there is one; else the original is."""

TOLERANCE_NATS = 0.02
"""Rise of the held-out loss over the reference at which quality counts as kept."""

FACTOR = 3.0
"""How many times smaller than the reference's F-Attn or M-Act must be to count as removed."""

ENOUGH_SEEDS = 3
"""Seeds from which a verdict is evidence."""

RULE = (
    f"An arm's quality is kept if its held-out loss is at most {TOLERANCE_NATS:g} nats above the reference's in every "
    f"seed. F-Attn or M-Act is removed if it is at most 1/{FACTOR:g} of the reference's in every seed, lower if it is "
    f"below it in every seed. Seeds are paired: equal data order. Fewer than {ENOUGH_SEEDS} seeds are no evidence."
)
"""The verdict, in words; it is fixed before anything is trained."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm over its seeds.

    Attributes:
        difference: Held-out loss against the reference; None for the reference itself.
        factors: By F-Attn and M-Act, the reference's over this arm's, for every seed.
    """

    name: str
    seeds: tuple[int, ...]
    runs: tuple[Adapted, ...]
    difference: PairedDifference | None
    factors: Mapping[str, tuple[float, ...]]
    rises: tuple[float, ...]

    def over_seeds(self, measure: str) -> Spread | None:
        """A measure over the seeds; None if no run has it."""
        values = [run.measures[measure] for run in self.runs if measure in run.measures]
        return spread(values) if values else None

    @property
    def quality(self) -> str:
        """`kept` or `lost` by `RULE`; empty for the reference."""
        if self.difference is None:
            return ""
        return "kept" if all(rise <= TOLERANCE_NATS for rise in self.rises) else "lost"

    def fate(self, measure: str) -> str:
        """`removed`, `lower` or `not lower` by `RULE`; empty for the reference."""
        factors = self.factors.get(measure, ())
        if self.difference is None or not factors:
            return ""
        if all(factor >= FACTOR for factor in factors):
            return "removed"
        return "lower" if all(factor > 1 for factor in factors) else "not lower"


@dataclass(frozen=True, slots=True)
class Findings:
    """All arms, the original first; `reference` names the one that the others are compared with."""

    reference: str
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm | None:
        """The arm of that name."""
        return next((arm for arm in self.arms if arm.name == name), None)


def compare_arms(records: Sequence[Adapted]) -> Findings:
    """The arms of a folder of records, the original first.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("there is no finished record to report; run `gated-attention adapt` first")
    arms: dict[str, list[Adapted]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)
    reference = CONTROL if CONTROL in arms else next(iter(arms))
    others = {record.seed: record for record in arms[reference]}
    return Findings(reference, tuple(_arm(name, runs, reference, others) for name, runs in arms.items()))


def _arm(name: str, runs: Sequence[Adapted], reference: str, others: Mapping[int, Adapted]) -> Arm:
    def paired(run: Adapted) -> Adapted | None:
        return others[0] if reference == ORIGINAL else others.get(run.seed)

    seeds = tuple(run.seed for run in runs)
    if name in (reference, ORIGINAL):
        return Arm(name, seeds, tuple(runs), None, {}, ())
    pairs = [(run, other) for run in runs if (other := paired(run))]
    losses = {run.seed: run.measures["loss_nats"] for run, _ in pairs}
    before = {run.seed: other.measures["loss_nats"] for run, other in pairs}
    factors = {
        measure: tuple(_ratio(other.measures[measure], run.measures[measure]) for run, other in pairs)
        for measure in ("f_attn", "m_act")
    }
    rises = tuple(losses[seed] - before[seed] for seed in losses)
    return Arm(name, seeds, tuple(runs), paired_difference(losses, before), factors, rises)


def _ratio(before: float, after: float) -> float:
    return before / after if after > 0 and isfinite(after) else nan
