"""Tables of a study of many points: the optimum of each variant, the loss at each rate, every run as CSV."""

from collections.abc import Sequence

from gated_attention.report.command_line import source_name
from gated_attention.report.study.columns import VARIANT
from gated_attention.report.study.table import difference_text, spread_text, verdict_tone
from gated_attention.report.tables import (
    Cell,
    Column,
    Table,
    csv_of,
    exact_text,
    fixed,
    number_text,
    significant,
    table_of,
)
from gated_attention.study.grid.rates import FACTOR, RATE, Curve, Setting, point_of, value_text
from gated_attention.study.statistics import Spread, paired_difference, spread

SETTING = Column("Setting", numeric=False)
OPTIMUM = Column(
    "Best rate",
    meaning="the peak learning rate of the lowest mean validation loss, among those with the most seeds; < or > where "
    "it is the lowest or the highest that was tried, so that the optimum may lie beyond",
)
SENSITIVITY = Column(
    "Sensitivity", "nats", better="lower",
    meaning="mean over learning rates of the loss minus the best loss, for each seed (arXiv 2309.14322), at the rates "
    "where every variant has every seed; no loss counts for more than that of a uniform guess",
)  # fmt: skip
DIVERGED = Column(
    "Diverged", better="lower",
    meaning="runs that ended without a finite loss, or with a higher one than at a tenth of training",
)  # fmt: skip
RISE = Column(
    f"Rise to {FACTOR:g} times it", "nats", better="lower",
    meaning=f"loss at {FACTOR:g} times the reference's best rate minus that at its best rate, with the same seed; "
    "a loss that is higher than a uniform guess's, or not finite, counts as that",
)  # fmt: skip
CLAIM = Column(
    "Minus the reference's", "nats", beneath=True, better="lower",
    meaning="that rise minus the reference's, paired over seeds, with the standard error of the mean",
)  # fmt: skip


def optimum_table(settings: Sequence[Setting]) -> Table:
    """A row for each variant of each setting."""
    rows = [(setting, curve) for setting in settings for curve in setting.curves]
    return table_of(
        {
            VARIANT: [curve.variant for _, curve in rows],
            SETTING: [setting.label for setting, _ in rows],
            Column("Runs"): [str(sum(map(len, curve.losses.values()))) for _, curve in rows],
            OPTIMUM: [_optimum(curve) for _, curve in rows],
            Column("Loss there", "nats", better="lower"): [
                spread_text(spread(curve.capped(curve.best).values()), fixed(4)) for _, curve in rows
            ],
            RISE: [_rise(setting, curve) for setting, curve in rows],
            CLAIM: [_claim(setting, curve) for setting, curve in rows],
            SENSITIVITY: [_sensitivity(setting, curve) for setting, curve in rows],
            DIVERGED: [_diverged(curve) for _, curve in rows],
        }
    )


def loss_table(settings: Sequence[Setting]) -> Table:
    """A row for each setting and learning rate, a column for each variant, and its difference to the reference."""
    rows = [(setting, rate) for setting in settings for rate in setting.rates]
    columns: dict[Column, list[Cell | str | None]] = {
        Column("Learning rate"): [value_text(rate) for _, rate in rows],
        SETTING: [setting.label for setting, _ in rows],
    }
    for name in dict.fromkeys(curve.variant for setting in settings for curve in setting.curves):
        found = [(setting, _find(setting, name, rate), rate) for setting, rate in rows]
        columns[Column(name)] = [_loss(curve, rate) for _, curve, rate in found]
        columns[Column(f"{name} minus the reference", beneath=True)] = [_difference(*one) for one in found]
    return table_of(columns)


def inside_table(settings: Sequence[Setting], measure: str) -> Table:
    """A measure at each learning rate, a column for each variant."""
    rows = [(setting, rate) for setting in settings for rate in setting.rates]
    columns: dict[Column, list[Cell | str | None]] = {
        Column("Learning rate"): [value_text(rate) for _, rate in rows],
        SETTING: [setting.label for setting, _ in rows],
    }
    for name in dict.fromkeys(curve.variant for setting in settings for curve in setting.curves):
        found = [(_find(setting, name, rate), rate) for setting, rate in rows]
        columns[Column(name)] = [
            spread_text(spread(values), significant(3)) if (values := _values(curve, measure, rate)) else None
            for curve, rate in found
        ]
    return table_of(columns)


def csv_text(settings: Sequence[Setting]) -> str:
    """Every run as a line: its point, its loss, its other measures; empty where there is none."""
    runs = [
        (curve, rate, seed, run)
        for setting in settings
        for curve in setting.curves
        for rate, found in curve.runs.items()
        for seed, run in found.items()
    ]
    measures = dict.fromkeys(name for *_, run in runs for name in run.measures)
    lines = [
        {
            "variant": curve.variant,
            **{key: source_name(value) if isinstance(value, str) else value for key, value in point_of(run).items()},
            RATE: exact_text(rate),
            "seed": seed,
            "is_diverged": (rate, seed) in curve.diverged,
            "parameters": run.config.get("parameters", {}).get("total"),
            "tokens": run.tokens_seen,
            "device": run.device,
            **{name: exact_text(run.measures[name].value) if name in run.measures else None for name in measures},
        }
        for curve, rate, seed, run in runs
    ]
    return csv_of([lines[0].keys(), *(line.values() for line in lines)])


def _values(curve: Curve | None, measure: str, rate: float) -> list[float]:
    return list(curve.values(measure, rate).values()) if curve else []


def _find(setting: Setting, name: str, rate: float) -> Curve | None:
    return next((curve for curve in setting.curves if curve.variant == name and rate in curve.losses), None)


def _optimum(curve: Curve) -> str:
    edge = "" if not curve.is_at_edge else "< " if curve.best == min(curve.losses) else "> "
    return edge + value_text(curve.best)


def _loss(curve: Curve | None, rate: float) -> Cell | str | None:
    if curve is None:
        return None
    found = spread(curve.losses[rate].values())
    count = f" ({found.n})" if found.n < max(map(len, curve.losses.values())) else ""
    lost = len([1 for at, _ in curve.diverged if at == rate])
    text = spread_text(found, fixed(4)) + count * bool(found.n)
    return Cell(text, "bad") if lost else text


def _difference(setting: Setting, curve: Curve | None, rate: float) -> Cell | None:
    reference = setting.reference
    if curve is None or curve is reference or rate not in reference.losses:
        return None
    found = paired_difference(curve.losses[rate], reference.losses[rate])
    return Cell(difference_text(found), verdict_tone(found)) if found.n else None


def _rise(setting: Setting, curve: Curve) -> str | None:
    low, high = setting.reference.best, setting.high
    if high is None or not {low, high} <= curve.losses.keys():
        return None
    return _signed(spread(curve.rise(low, high).values()))


def _claim(setting: Setting, curve: Curve) -> Cell | None:
    found = None if curve is setting.reference else setting.claim(curve)
    return Cell(difference_text(found), verdict_tone(found)) if found and found.n else None


def _sensitivity(setting: Setting, curve: Curve) -> str | None:
    found = curve.sensitivity(setting.common_rates) if len(setting.common_rates) > 1 else {}
    return spread_text(spread(found.values()), fixed(4)) if found else None


def _diverged(curve: Curve) -> Cell | str:
    number, total = len(curve.diverged), sum(map(len, curve.losses.values()))
    return Cell(f"{number} of {total}", "bad") if number else f"0 of {total}"


def _signed(found: Spread) -> str:
    text = number_text(found.mean, 4, "+")
    return text if found.sd is None else f"{text} ± {number_text(found.sd, 4)}"
