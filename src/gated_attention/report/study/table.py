"""A study's comparison as a table, for Markdown, HTML and the terminal, and as CSV; and what the study cost."""

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table as RichTable

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
    fixed,
    number_text,
    rich_table,
    significant,
    table_of,
)
from gated_attention.study.comparison import LOSS, Comparison, compare_variants
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, t_quantile

_FOUR, _THREE = fixed(4), significant(3)


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


def comparison_table(comparison: Comparison) -> Table:
    """Parameters, loss, paired difference and what the paper measures, a row for each variant."""
    rows = comparison.rows

    def spreads(measure: str, decimals: Decimals) -> list[str]:
        return [spread_text(row.measures.get(measure), decimals) for row in rows]

    def means(measure: str, decimals: Decimals) -> list[str]:
        found = [row.measures.get(measure) for row in rows]
        return [spread_text(one and replace(one, sd=None), decimals) for one in found]

    parameters = [row.parameters for row in rows]
    return table_of(
        {
            Column("Variant", numeric=False): [row.variant for row in rows],
            Column("Gate", beneath=True, numeric=False): [row.gate for row in rows],
            Column("Parameters", "M"): [number_text(count and count / 1e6, 3) for count in parameters],
            Column("Residue", "%", beneath=True): [
                None if row.residue is None else f"{100 * row.residue:+.2f}" for row in rows
            ],
            Column("Validation loss", "nats/token"): spreads(LOSS, _FOUR),
            Column("PPL", beneath=True): spreads("val_perplexity", significant(5)),
            Column("Diverged", beneath=True): [_diverged_cell(row.measures.get(LOSS)) for row in rows],
            Column("Difference", "nats/token"): [difference_text(row.difference) for row in rows],
            Column("Verdict", beneath=True): [_verdict_cell(row.difference) for row in rows],
            Column("F-Attn"): means("f_attn", _FOUR),
            Column("Uniform", beneath=True): means("f_attn_uniform", _FOUR),
            Column("M-Act"): means("m_act", _THREE),
            Column("Gate mean"): means("gate_score_mean", _FOUR),
            Column("Below 0.1", beneath=True): means("gate_share_below_0.1", _FOUR),
            Column("Tokens/s"): means("train_tokens_per_s", fixed(0)),
            Column("Memory", "GiB", beneath=True): means("peak_memory_gib", fixed(2)),
        }
    )


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
            Column("Variant", numeric=False): [row.variant for row in comparison.rows],
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
