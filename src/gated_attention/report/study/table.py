"""A study's comparison as a table, for Markdown, HTML and the terminal, and as CSV."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.table import Table as RichTable

from gated_attention.report.tables import (
    ABSENT,
    Cell,
    Column,
    Table,
    Tone,
    csv_of,
    exact_text,
    fixed,
    rich_table,
    significant,
    table_of,
)
from gated_attention.study.comparison import LOSS, Comparison, compare_variants
from gated_attention.study.record import Result
from gated_attention.study.statistics import PairedDifference, Spread, t_quantile

_LOSS_DIGITS, _PPL_DIGITS, _SHARE_DIGITS, _ACT_DIGITS = fixed(4), significant(5), fixed(4), significant(3)


def spread_text(found: Spread | None, decimals: Callable[[float], int]) -> str:
    """Mean and standard deviation with as many decimals as suit the mean, `diverged` where no value is finite."""
    if found is None:
        return ABSENT
    if found.n == 0:
        return "diverged"
    places = decimals(found.mean)
    text = f"{found.mean:,.{places}f}"
    return text if found.sd is None else f"{text} ± {found.sd:,.{places}f}"


def difference_text(difference: PairedDifference) -> str:
    """Mean difference with its standard error."""
    if difference.n == 0:
        return ABSENT
    text = f"{difference.mean:+.4f}"
    return text if difference.standard_error is None else f"{text} ± {difference.standard_error:.4f}"


def verdict_text(difference: PairedDifference) -> str:
    """Verdict with the t statistic and the number of pairs it rests on."""
    verdict, t = difference.verdict, difference.t
    return verdict if t is None else f"{verdict} (t = {t:+.1f}, n = {difference.n})"


def comparison_table(comparison: Comparison) -> Table:
    """Parameters, loss, paired difference and what the paper measures, a row for each variant."""
    rows = comparison.rows

    def spreads(measure: str, decimals: Callable[[float], int]) -> list[Cell]:
        return [Cell(spread_text(row.measures.get(measure), decimals)) for row in rows]

    def means(measure: str, decimals: Callable[[float], int]) -> list[Cell]:
        return [Cell(spread_text(_without_sd(row.measures.get(measure)), decimals)) for row in rows]

    millions = [Cell(ABSENT if row.parameters is None else f"{row.parameters / 1e6:,.3f}") for row in rows]
    residues = [Cell(ABSENT if row.residue is None else f"{100 * row.residue:+.2f}") for row in rows]
    differences = [row.difference for row in rows]
    columns = {
        Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
        Column("Gate", beneath=True, numeric=False): [Cell(row.gate or ABSENT) for row in rows],
        Column("Parameters", "M"): millions,
        Column("Residue", "%", beneath=True): residues,
        Column("Validation loss", "nats/token"): spreads(LOSS, _LOSS_DIGITS),
        Column("PPL", beneath=True): spreads("val_perplexity", _PPL_DIGITS),
        Column("Diverged", beneath=True): [_diverged_cell(row.measures.get(LOSS)) for row in rows],
        Column("Difference", "nats/token"): [Cell(difference_text(d) if d else ABSENT) for d in differences],
        Column("Verdict", beneath=True): [_verdict_cell(d) for d in differences],
        Column("F-Attn"): means("f_attn", _SHARE_DIGITS),
        Column("Uniform", beneath=True): means("f_attn_uniform", _SHARE_DIGITS),
        Column("M-Act"): means("m_act", _ACT_DIGITS),
        Column("Gate mean"): means("gate_score_mean", _SHARE_DIGITS),
        Column("Below 0.1", beneath=True): means("gate_share_below_0.1", _SHARE_DIGITS),
        Column("Tokens/s"): means("train_tokens_per_s", fixed(0)),
        Column("Memory", "GiB", beneath=True): means("peak_memory_gib", fixed(2)),
    }
    return table_of(columns)


def _diverged_cell(loss: Spread | None) -> Cell:
    if loss is None or not loss.num_diverged:
        return Cell(ABSENT)
    return Cell(f"{loss.num_diverged} of {loss.n + loss.num_diverged} diverged", "bad")


def _without_sd(found: Spread | None) -> Spread | None:
    return found and replace(found, sd=None)


def _verdict_cell(difference: PairedDifference | None) -> Cell:
    if difference is None:
        return Cell(ABSENT)
    return Cell(verdict_text(difference), verdict_tone(difference))


def verdict_tone(difference: PairedDifference) -> Tone:
    """How a verdict is meant; a variant that loses runs to divergence is not called good."""
    tones: dict[str, Tone] = {"better": "muted" if difference.num_lost else "good", "worse": "bad", "diverged": "bad"}
    return tones.get(difference.verdict, "muted")


def terminal_table(results: Sequence[Result], width: int | None = None) -> RichTable:
    """The comparison for a terminal: a row for each variant, or a column for each on a narrow one.

    Args:
        results: Finished runs.
        width: Columns to print in; None for those of the terminal.

    Raises:
        ValueError: as `compare_variants`.
    """
    return rich_table(comparison_table(compare_variants(results)), width)


def csv_text(comparison: Comparison) -> str:
    """The comparison as CSV: numbers in the units of the column names, empty where there is none."""
    measures = dict.fromkeys(name for row in comparison.rows for name in row.measures)
    lines: list[list[str]] = [
        [
            *("variant", "gate", "cites", "seeds", "num_diverged", "parameters", "residue_share"),
            *("difference_nats", "standard_error_nats", "num_pairs", "t", "t_quantile", "verdict"),
            *(f"{name}{part}" for name in measures for part in ("", "_sd")),
        ]
    ]
    for row in comparison.rows:
        loss = row.measures.get(LOSS)
        head = [row.variant, row.gate, " ".join(row.cites), " ".join(map(str, row.seeds))]
        head += [str(loss.num_diverged if loss else 0), exact_text(row.parameters), exact_text(row.residue)]
        spreads = [row.measures.get(name) for name in measures]
        tail = [exact_text(value) for found in spreads for value in ((found.mean, found.sd) if found else (None, None))]
        lines.append([*head, *_difference_fields(row.difference), *tail])
    return csv_of(lines)


def _difference_fields(difference: PairedDifference | None) -> list[str]:
    if difference is None:
        return [""] * 6
    quantile = t_quantile(difference.n - 1) if difference.n > 1 else None
    numbers = (difference.mean, difference.standard_error, difference.n, difference.t, quantile)
    return [*map(exact_text, numbers), difference.verdict]
