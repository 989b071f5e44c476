"""A study's variants as data: each over its seeds, and compared with the baseline."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from gated_attention.registry.choices import TEXT, VISION
from gated_attention.registry.published import ROWS
from gated_attention.registry.variants import BASELINE
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, paired_difference, spread
from gated_attention.typed import contradict

LOSS = "val_loss_nats"
"""The measure that variants are compared by."""


@dataclass(frozen=True, slots=True)
class VariantRow:
    """One variant over its seeds.

    Attributes:
        gate: The gate in words.
        parameters: Total number of parameters; None if the records do not say.
        residue: Parameters relative to the baseline's, minus 1.
        measures: Every measure over seeds; a run whose validation loss is not finite counts as diverged in all of them.
        difference: Validation loss against the baseline; None for the baseline itself or without one.
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
        """Validation loss by seed, NaN for a run that diverged."""
        return self.values.get(LOSS, {})

    def mean(self, measure: str) -> float | None:
        """Mean of a measure over the runs that did not diverge; None if there is none."""
        found = self.measures.get(measure)
        return found.mean if found and found.n else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The variants of a study in the order of `variant_order`, the reference first.

    Attributes:
        reference: The variant that differences refer to; None if there is only one.
        task: As `StudyPlan.task`.
    """

    reference: str | None
    rows: tuple[VariantRow, ...]
    task: str = TEXT

    @property
    def unit(self) -> str:
        """The unit of the loss: nats of the next token, or of an image's label."""
        return "nats/image" if self.task == VISION else "nats/token"

    @property
    def cited(self) -> dict[str, VariantRow]:
        """The variants by the rows of the paper's tables that they are."""
        return {key: row for row in self.rows for key in row.cites if key in ROWS}

    def own_difference(self, key: str) -> PairedDifference | None:
        """Validation loss of the paper's row against the paper's own baseline for it; None if either is missing.

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
    """Summarise runs by variant, and against `baseline`, or against the first variant if none has that name.

    Raises:
        ValueError: if there are no runs, two of the same variant and seed, or two that read different text under the
            same settings.
    """
    if not results:
        raise ValueError("there is no finished run to compare; train at least one variant")
    arms: dict[str, dict[int, Result]] = {name: {} for name in variant_order(results)}
    for result in sorted(results, key=lambda result: result.seed):
        if result.seed in arms[result.variant]:
            raise ValueError(f"two results of {result.variant} with seed {result.seed}; keep one of them")
        arms[result.variant][result.seed] = result
        config, first = result.config, results[0].config
        if config.get("data") == first.get("data") and contradict(config.get("text", {}), first.get("text", {})):
            raise ValueError(
                f"{result.variant} seed {result.seed} was trained on other text than {results[0].variant} seed "
                f"{results[0].seed}, under the same name; move one of them away"
            )
    rows: list[VariantRow] = []
    for runs in arms.values():
        rows.append(_row(runs, rows[0] if rows else None))
    task = results[0].config.get("task", TEXT)
    return Comparison(rows[0].variant if len(rows) > 1 else None, tuple(rows), task)


def _row(runs: Mapping[int, Result], reference: VariantRow | None) -> VariantRow:
    first = next(iter(runs.values()))
    variant = first.config.get("variant", {})
    total = first.config.get("parameters", {}).get("total")
    values = {
        name: {
            seed: nan if diverged(run) else run.measures[name].value
            for seed, run in runs.items()
            if name in run.measures
        }
        for name in dict.fromkeys(name for run in runs.values() for name in run.measures)
    }
    return VariantRow(
        variant=first.variant,
        gate=variant.get("description", ""),
        cites=tuple(variant.get("cites", ())),
        seeds=tuple(runs),
        parameters=total,
        residue=total / reference.parameters - 1.0 if total and reference and reference.parameters else None,
        measures={name: spread(found.values()) for name, found in values.items()},
        difference=paired_difference(values.get(LOSS, {}), reference.losses) if reference else None,
        values=values,
    )
