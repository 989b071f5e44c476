"""A study's variants as data: each over its seeds, and against the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from gated_attention.registry.published import ROWS
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, paired_difference, spread

BASELINE = "baseline"
"""Name of the variant that the others are compared with, where a study has it."""

LOSS = "val_loss_nats"
"""The measure that variants are compared by."""


@dataclass(frozen=True, slots=True)
class VariantRow:
    """One variant over its seeds.

    Attributes:
        gate: The gate in words.
        residue: Share of the baseline's parameters by which this variant's exceed them.
        measures: Every measure over seeds; a run whose validation loss is not finite counts as diverged in all.
        difference: Validation loss against the baseline; None for the baseline and where there is none.
        values: Every measure by seed, NaN for a run that diverged.
    """

    variant: str
    gate: str
    cites: tuple[str, ...]
    seeds: tuple[int, ...]
    parameters: int | None
    residue: float | None
    measures: Mapping[str, Spread]
    difference: PairedDifference | None
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def losses(self) -> Mapping[int, float]:
        """Seed to validation loss, NaN for a run that diverged."""
        return self.values.get(LOSS, {})

    def mean(self, measure: str) -> float | None:
        """Mean of a measure over the runs that did not diverge; None if there is none."""
        found = self.measures.get(measure)
        return found.mean if found and found.n else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The variants of a study in the order of `variant_order`, the reference first.

    Attributes:
        reference: Whom the differences refer to; None where there is nothing to compare.
    """

    reference: str | None
    rows: tuple[VariantRow, ...]

    @property
    def cited(self) -> dict[str, VariantRow]:
        """The variants by the rows of the paper's tables that they are."""
        return {key: row for row in self.rows for key in row.cites if key in ROWS}

    def own_difference(self, key: str) -> PairedDifference | None:
        """Validation loss of the paper's row against the baseline that the paper has for it; None if one is not here.

        Where the learning rate differs, that baseline is another variant than the study's reference.
        """
        ours, baseline = self.cited.get(key), self.cited.get(ROWS[key].baseline or "")
        return paired_difference(ours.losses, baseline.losses) if ours and baseline else None


def diverged(result: Result) -> bool:
    """Whether a run ended with a validation loss that is not finite."""
    loss = result.measures.get(LOSS)
    return loss is not None and not isfinite(loss.value)


def variant_order(results: Iterable[Result]) -> list[str]:
    """Names of the variants: `baseline` first, then in the order of the paper's rows, then by name."""
    places = {key: place for place, key in enumerate(ROWS)}
    cites = {result.variant: result.config.get("variant", {}).get("cites", ()) for result in results}

    def place(name: str) -> tuple[bool, int, str]:
        return name != BASELINE, min((places.get(key, len(ROWS)) for key in cites[name]), default=len(ROWS)), name

    return sorted(cites, key=place)


def compare_variants(results: Sequence[Result]) -> Comparison:
    """Summarise runs by variant, and against the baseline, or the first variant if none has that name.

    Raises:
        ValueError: if there are no runs, or two of the same variant and seed.
    """
    if not results:
        raise ValueError("there is no finished run to compare; train at least one variant")
    arms: dict[str, dict[int, Result]] = {name: {} for name in variant_order(results)}
    for result in results:
        if result.seed in arms[result.variant]:
            raise ValueError(f"two results of {result.variant} with seed {result.seed}; keep one of them")
        arms[result.variant][result.seed] = result
    reference = next(iter(arms)) if len(arms) > 1 else None
    rows = tuple(
        _row(runs, arms[reference] if reference and name != reference else None) for name, runs in arms.items()
    )
    return Comparison(reference, rows)


def _row(runs: Mapping[int, Result], reference: Mapping[int, Result] | None) -> VariantRow:
    first = next(iter(runs.values()))
    variant = first.config.get("variant", {})
    parameters = _total_parameters(runs)
    others = _total_parameters(reference) if reference else None
    names = dict.fromkeys(name for run in runs.values() for name in run.measures)
    values = {name: _values(runs, name) for name in names}
    return VariantRow(
        variant=first.variant,
        gate=variant.get("description", ""),
        cites=tuple(variant.get("cites", ())),
        seeds=tuple(sorted(runs)),
        parameters=parameters,
        residue=parameters / others - 1.0 if parameters and others else None,
        measures={name: spread(found.values()) for name, found in values.items()},
        difference=paired_difference(values.get(LOSS, {}), _values(reference, LOSS)) if reference else None,
        values=values,
    )


def _total_parameters(runs: Mapping[int, Result]) -> int | None:
    total = next(iter(runs.values())).config.get("parameters", {}).get("total")
    return None if total is None else int(total)


def _values(runs: Mapping[int, Result], measure: str) -> dict[int, float]:
    """Seed to value; NaN for a run that diverged."""
    return {
        seed: nan if diverged(run) else run.measures[measure].value
        for seed, run in sorted(runs.items())
        if measure in run.measures
    }
