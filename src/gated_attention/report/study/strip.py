"""The result strip of a study: loss, sink, activations and speed, a line per variant."""

from math import exp, log, nan

from gated_attention.report.study.columns import (
    F_ATTN,
    M_ACT,
    REMOVED_SHARE,
    SINK_FACTOR,
    VARIANT,
    VERDICT,
    difference,
)
from gated_attention.report.study.table import spread_text, verdict_tone
from gated_attention.report.tables import ABSENT, Cell, Column, Table, fixed, number_text, significant, table_of
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import CONFIDENCE, PairedDifference, paired_difference

_COLUMNS = (
    VERDICT,
    Column("Accuracy", better="higher", meaning="share of held-out images whose likeliest label is right"),
    F_ATTN._replace(unit="times uniform"),
    Column(
        "Sink", numeric=False,
        meaning=f"a sink is F-Attn of at least {SINK_FACTOR:.0f} times uniform attention's; removed is a third or less "
        "of the reference's sink, weakened significantly less (paired t test)",
    ),
    M_ACT._replace(
        unit="ratio", meaning=f"{M_ACT.meaning}; the ratio to the reference's is a geometric mean over seeds"
    ),
    Column("Speed", "%", better="higher", meaning="training throughput, relative to the reference's"),
)  # fmt: skip


def result_strip(comparison: Comparison) -> Table:
    """The strip; columns for which no run has a number are left out."""
    rows = [_cells(row, comparison.rows[0]) for row in comparison.rows]
    compared = difference(comparison)._replace(header=f"Difference [{100 * CONFIDENCE:.0f} % interval]")
    return table_of(dict(zip((VARIANT, compared, *_COLUMNS), zip(*rows, strict=True), strict=True)))


def _cells(row: VariantRow, reference: VariantRow) -> tuple[Cell | str | None, ...]:
    share, uniform = row.mean("f_attn"), row.mean("f_attn_uniform")
    speed, others = (one.mean("train_tokens_per_s") for one in (row, reference))
    return (
        row.variant,
        interval_text(row.difference) if row.difference else None,
        _verdict(row.difference),
        spread_text(found, fixed(4)) if (found := row.measures.get("accuracy")) else None,
        f"{share:.4f} ({share / uniform:.1f}x)" if share is not None and uniform else None,
        _sink(row, reference),
        _activation(row, reference),
        f"{100 * speed / others:.0f}" if speed is not None and others else None,
    )


def interval_text(found: PairedDifference) -> str:
    """Mean difference with its interval, where it has one."""
    if found.n == 0:
        return ABSENT
    half = found.half_width
    interval = "" if half is None else f" [{found.mean - half:+.4f}, {found.mean + half:+.4f}]"
    return f"{found.mean:+.4f}{interval}"


def _verdict(difference: PairedDifference | None) -> Cell:
    if difference is None:
        return Cell("reference", "muted")
    verdict = difference.verdict
    return Cell(verdict if difference.t is None else _on_one_line(verdict), verdict_tone(difference))


def _sink(row: VariantRow, reference: VariantRow) -> Cell | None:
    share, before, uniform = row.mean("f_attn"), reference.mean("f_attn"), reference.mean("f_attn_uniform")
    if share is None or before is None or not uniform:
        return None
    has_sink = before >= SINK_FACTOR * uniform
    if row is reference:
        return Cell("sink" if has_sink else f"below {SINK_FACTOR:.0f}x", "muted")
    if has_sink and share <= REMOVED_SHARE * before:
        return Cell("removed", "good")
    if paired_difference(row.values["f_attn"], reference.values["f_attn"]).verdict == "better":
        return Cell("weakened", "good")
    return Cell(_on_one_line("not weakened"), "muted")


def _on_one_line(words: str) -> str:
    return words.replace(" ", "\u00a0")


def _activation(row: VariantRow, reference: VariantRow) -> str | None:
    """M-Act and the geometric mean over seeds of its ratio to the reference's."""
    value = row.mean("m_act")
    if value is None:
        return None
    logs = [
        {seed: log(found) if found > 0 else nan for seed, found in one.values.get("m_act", {}).items()}
        for one in (row, reference)
    ]
    ratio = paired_difference(*logs)
    rest = f" ({exp(ratio.mean):.2f}x)" if row.difference and ratio.n else ""
    return number_text(value, significant(3)) + rest
