"""The result strip of a study: loss, sink, activations and speed, a line per variant."""

from math import exp, log, nan

from gated_attention.report.study.sections import REMOVED_SHARE, SINK_FACTOR, activation_text
from gated_attention.report.study.table import verdict_tone
from gated_attention.report.tables import ABSENT, Cell, Column, Table, table_of
from gated_attention.study.comparison import Comparison, VariantRow
from gated_attention.study.statistics import CONFIDENCE, PairedDifference, paired_difference


def result_strip(comparison: Comparison) -> Table:
    """The strip; columns for which no run has a number are left out."""
    rows = comparison.rows
    return table_of(
        {
            Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
            Column(f"Difference [{100 * CONFIDENCE:.0f} % interval]", "nats/token"): [_loss(row) for row in rows],
            Column("Verdict", numeric=False): [_verdict(row) for row in rows],
            Column("F-Attn", "times uniform"): [_share(row) for row in rows],
            Column("Sink", numeric=False): [_sink(row, rows[0]) for row in rows],
            Column("M-Act", "ratio"): [_activation(row, rows[0]) for row in rows],
            Column("Speed", "%"): [_speed(row, rows[0]) for row in rows],
        }
    )


def strip_note(comparison: Comparison) -> str:
    """How the strip is to be read."""
    text = (
        f"Difference: validation loss minus that of `{comparison.rows[0].variant}`, paired by seed; lower is better. "
    )
    if any("f_attn" in row.measures for row in comparison.rows):
        text += (
            f"A sink is F-Attn of at least {SINK_FACTOR:.0f} times uniform. Removed: a third or less of the "
            "reference's sink. Weakened: significantly less (paired t test). "
        )
    return f"{text}M-Act ratio and speed are relative to the reference; the ratio is a geometric mean over seeds."


def interval_text(found: PairedDifference) -> str:
    """Mean difference with its interval, where it has one."""
    if found.n == 0:
        return ABSENT
    half = found.half_width
    interval = "" if half is None else f" [{found.mean - half:+.4f}, {found.mean + half:+.4f}]"
    return f"{found.mean:+.4f}{interval}"


def _loss(row: VariantRow) -> Cell:
    return Cell(interval_text(row.difference) if row.difference else ABSENT)


def _verdict(row: VariantRow) -> Cell:
    if row.difference is None:
        return Cell("reference", "muted")
    verdict = row.difference.verdict
    return Cell(_on_one_line(verdict) if row.difference.t is not None else verdict, verdict_tone(row.difference))


def _share(row: VariantRow) -> Cell:
    share, uniform = row.mean("f_attn"), row.mean("f_attn_uniform")
    if share is None or not uniform:
        return Cell(ABSENT)
    return Cell(f"{share:.4f} ({share / uniform:.1f}x)")


def _sink(row: VariantRow, reference: VariantRow) -> Cell:
    """Removed: a third or less of a sink. Weakened: less by the paired t test."""
    share, uniform = row.mean("f_attn"), reference.mean("f_attn_uniform")
    before = reference.mean("f_attn")
    if share is None or before is None or not uniform:
        return Cell(ABSENT)
    has_sink = before >= SINK_FACTOR * uniform
    if row is reference:
        return Cell("sink" if has_sink else f"below {SINK_FACTOR:.0f}x", "muted")
    if has_sink and share <= REMOVED_SHARE * before:
        return Cell("removed", "good")
    if _paired("f_attn", row, reference).verdict == "better":
        return Cell("weakened", "good")
    return Cell(_on_one_line("not weakened"), "muted")


def _on_one_line(words: str) -> str:
    return words.replace(" ", "\u00a0")


def _activation(row: VariantRow, reference: VariantRow) -> Cell:
    """M-Act and the geometric mean over seeds of its ratio to the reference's."""
    value = row.mean("m_act")
    if value is None:
        return Cell(ABSENT)
    ratio = _paired("m_act", row, reference, logarithm=True)
    rest = f" ({exp(ratio.mean):.2f}x)" if row.difference and ratio.n else ""
    return Cell(f"{activation_text(value)}{rest}")


def _speed(row: VariantRow, reference: VariantRow) -> Cell:
    speed, others = row.mean("train_tokens_per_s"), reference.mean("train_tokens_per_s")
    return Cell(f"{100 * speed / others:.0f}" if speed is not None and others else ABSENT)


def _paired(measure: str, row: VariantRow, reference: VariantRow, logarithm: bool = False) -> PairedDifference:
    """A measure's difference to the reference, or its logarithm's, over the pairs that did not diverge."""
    ours, theirs = (one.values.get(measure, {}) for one in (row, reference))
    if logarithm:
        ours, theirs = ({seed: log(v) if v > 0 else nan for seed, v in one.items()} for one in (ours, theirs))
    return paired_difference(ours, theirs)
