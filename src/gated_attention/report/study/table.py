"""A study's comparison as a table, for Markdown, HTML and the terminal, and as CSV; and what the study cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rich.table import Table as RichTable

from gated_attention.report.study.columns import (
    INSIDE,
    PARAMETERS,
    RESIDUE,
    VARIANT,
    VERDICT,
    MeasureColumn,
    difference,
    losses,
)
from gated_attention.report.tables import (
    ABSENT,
    Cell,
    Column,
    Decimals,
    Table,
    Tone,
    count_text,
    csv_of,
    exact_text,
    number_text,
    rich_table,
    significant,
    table_of,
)
from gated_attention.study.comparison import LOSS, Comparison, compare_variants
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, spread, t_quantile

_THREE = significant(3)


def spread_text(found: Spread | None, decimals: Decimals) -> str:
    """Mean and standard deviation with as many decimals as suit the mean, `diverged` where no value is finite."""
    if found is None:
        return ABSENT
    if found.n == 0:
        return "diverged"
    places = decimals(found.mean)
    text = number_text(found.mean, places)
    return text if found.sd is None else f"{text} ± {number_text(found.sd, places)}"


def difference_text(difference: PairedDifference | None) -> str:
    """Mean difference with its standard error."""
    if difference is None or difference.n == 0:
        return ABSENT
    text = f"{difference.mean:+.4f}"
    return text if difference.standard_error is None else f"{text} ± {difference.standard_error:.4f}"


def verdict_tone(difference: PairedDifference) -> Tone:
    """The tone of a verdict; a variant that loses runs to divergence is not called good."""
    tones: dict[str, Tone] = {"better": "muted" if difference.num_lost else "good", "worse": "bad", "diverged": "bad"}
    return tones.get(difference.verdict, "muted")


def measured(columns: Iterable[MeasureColumn], rows: Sequence[Mapping[str, Spread]]) -> dict[Column, list[str]]:
    """Columns of measures, a cell for each row's values over seeds."""
    return {
        column: [
            spread_text(found and replace(found, sd=found.sd if has_spread else None), decimals)
            for found in (row.get(measure) for row in rows)
        ]
        for column, measure, decimals, has_spread in columns
    }


def comparison_table(comparison: Comparison) -> Table:
    """Parameters, loss, paired difference and what the paper measures, a row for each variant."""
    rows = comparison.rows
    measures = [row.measures for row in rows]
    return table_of(
        {
            VARIANT: [row.variant for row in rows],
            Column("Gate", beneath=True, numeric=False): [row.gate for row in rows],
            PARAMETERS: [number_text(row.parameters and row.parameters / 1e6, 3) for row in rows],
            RESIDUE: [None if row.residue is None else f"{100 * row.residue:+.2f}" for row in rows],
            **measured(losses(comparison), measures),
            Column("Diverged", beneath=True): [_diverged_cell(found.get(LOSS)) for found in measures],
            difference(comparison): [difference_text(row.difference) for row in rows],
            VERDICT._replace(beneath=True, numeric=True): [_verdict_cell(row.difference) for row in rows],
            **measured(INSIDE, measures),
        }
    )


def runs_table(results: Sequence[Result], comparison: Comparison) -> Table:
    """The raw numbers, a row for each run."""
    measures = [{name: spread([one.value]) for name, one in run.measures.items()} for run in results]
    names, seeds = [run.variant for run in results], [str(run.seed) for run in results]
    return table_of({VARIANT: names, Column("Seed"): seeds, **measured(losses(comparison) + INSIDE, measures)})


def _diverged_cell(loss: Spread | None) -> Cell | None:
    if loss is None or not loss.num_diverged:
        return None
    return Cell(f"{loss.num_diverged} of {loss.n + loss.num_diverged} diverged", "bad")


def _verdict_cell(difference: PairedDifference | None) -> Cell | None:
    """Verdict with the t statistic and the number of pairs behind it."""
    if difference is None:
        return None
    reason = "" if difference.t is None else f" (t = {difference.t:+.1f}, n = {difference.n})"
    return Cell(difference.verdict + reason, verdict_tone(difference))


def terminal_table(results: Sequence[Result], width: int | None = None) -> RichTable:
    """The comparison for a terminal of this width; None is the present one's.

    Raises:
        ValueError: as `compare_variants`.
    """
    return rich_table(comparison_table(compare_variants(results)), width)


def csv_text(comparison: Comparison) -> str:
    """The comparison as CSV: numbers in the units of the column names, empty where there is none."""
    measures = dict.fromkeys(name for row in comparison.rows for name in row.measures)
    lines = []
    for row in comparison.rows:
        loss, found = row.measures.get(LOSS), row.difference
        line: dict[str, object] = {
            "variant": row.variant,
            "gate": row.gate,
            "cites": " ".join(row.cites),
            "seeds": " ".join(map(str, row.seeds)),
            "num_diverged": loss.num_diverged if loss else 0,
            "parameters": row.parameters,
            "residue_share": exact_text(row.residue),
            "difference_nats": exact_text(found.mean if found else None),
            "standard_error_nats": exact_text(found.standard_error if found else None),
            "num_pairs": found.n if found else None,
            "t": exact_text(found.t if found else None),
            "t_quantile": exact_text(t_quantile(found.n - 1) if found and found.n > 1 else None),
            "verdict": found.verdict if found else None,
        }
        for name in measures:
            measure = row.measures.get(name)
            line[name] = exact_text(measure.mean if measure else None)
            line[f"{name}_sd"] = exact_text(measure.sd if measure else None)
        lines.append(line)
    return csv_of([lines[0].keys(), *(line.values() for line in lines)])


def cost_table(results: Sequence[Result], comparison: Comparison) -> Table:
    """Runs, tokens and training time of each variant; a run's time is its tokens over its median speed."""
    device = "CPU" if all(run.device.startswith("CPU") for run in results) else "GPU"
    arms = [[run for run in results if run.variant == row.variant] for row in comparison.rows]
    times = [[_hours(run) for run in runs] for runs in arms]
    hours = [sum(filter(None, found)) if all(found) else None for found in times]
    return table_of(
        {
            VARIANT: [row.variant for row in comparison.rows],
            Column("Runs"): [str(len(runs)) for runs in arms],
            Column("Tokens"): [count_text(sum(run.tokens_seen for run in runs)) for runs in arms],
            Column("Time per run", "hours"): [
                number_text(total and total / len(runs), _THREE) for total, runs in zip(hours, arms, strict=True)
            ],
            Column("All runs", f"{device} hours"): [number_text(total, _THREE) for total in hours],
        }
    )


def _hours(run: Result) -> float | None:
    speed = run.measures.get("train_tokens_per_s")
    return run.tokens_seen / speed.value / 3600 if speed and speed.value > 0 else None
