"""The tables of an adaptation, for the page and the terminal, and its numbers as CSV."""

from math import nan

from gated_attention.evaluate.loss import perplexity
from gated_attention.report.adapt.findings import ENOUGH_SEEDS, Arm, Findings
from gated_attention.report.study.table import difference_text, spread_text
from gated_attention.report.tables import (
    Cell,
    Column,
    Decimals,
    Table,
    Tone,
    csv_of,
    exact_text,
    fixed,
    number_text,
    significant,
    table_of,
)
from gated_attention.study.statistics import Spread, spread

_MODEL = Column("Model", numeric=False)
_THREE = significant(3)

_MEASURES: tuple[tuple[Column, str, Decimals], ...] = (
    (
        Column("F-Attn", better="lower", meaning="attention to the first token, mean over queries, heads and layers"),
        "f_attn", fixed(4),
    ),
    (
        Column("Sink^0.3", "%", better="lower", meaning="heads whose first token gets more than 0.3 of attention"),
        "sink_rate", fixed(1),
    ),
    (
        Column("M-Act", better="lower", meaning="largest activation of a layer, averaged over layers"),
        "m_act", _THREE,
    ),
)  # fmt: skip

_CHANGES: tuple[tuple[Column, str], ...] = (
    (
        Column(
            "W8A8", "nats", better="lower",
            meaning="rise of the loss with weights and activations in 8 bits, one static scale per activation tensor",
        ),
        "w8a8_nats",
    ),
    (
        Column(
            "Without token 0", "nats", better="lower",
            meaning="rise of the loss, on tokens that have a whole window before them, where attention never sees "
            "the first token",
        ),
        "no_first_nats",
    ),
    (
        Column(
            "In a window", "nats", better="lower",
            meaning="the same where attention sees a window of the last tokens only, and never the first token",
        ),
        "window_nats",
    ),
    (
        Column(
            "YaRN", "nats", better="lower",
            meaning="rise of the loss within one context when the rotary embedding is stretched by YaRN",
        ),
        "yarn_nats",
    ),
)  # fmt: skip


def main_table(findings: Findings) -> Table:
    """Quality and sink of every arm: the original, then those that were trained, mean over seeds ± their sd."""
    arms = findings.arms
    columns: dict[Column, list[Cell | str | None]] = {
        _MODEL: [arm.name for arm in arms],
        Column("Seeds"): [None if not arm.runs[0].tokens_seen else str(len(arm.seeds)) for arm in arms],
        Column("Loss", "nats/token", better="lower", meaning="mean cross-entropy of the held-out text"): [
            spread_text(arm.over_seeds("loss_nats"), fixed(4)) for arm in arms
        ],
        Column("Perplexity", beneath=True, better="lower", meaning="the exponential of the loss"): [
            spread_text(_perplexities(arm, "loss_nats"), fixed(2)) for arm in arms
        ],
        Column(
            f"To {findings.reference}", "nats", better="lower",
            meaning="difference of the loss, paired by seed, ± standard error",
        ): [difference_text(arm.difference) for arm in arms],
    }  # fmt: skip
    for column, name, decimals in _MEASURES:
        columns[column] = [spread_text(_scaled(arm.over_seeds(name), column.unit), decimals) for arm in arms]
    columns[Column("W8A8 perplexity", better="lower", meaning="perplexity with weights and activations in 8 bits")] = [
        spread_text(_perplexities(arm, "w8a8_loss_nats"), fixed(2)) for arm in arms
    ]
    return table_of(columns)


def change_table(findings: Findings) -> Table:
    """What rounding, hiding the first token and YaRN cost every arm."""
    arms = findings.arms
    changes: dict[Column, list[Cell | str | None]] = {
        column: [spread_text(arm.over_seeds(name), fixed(4)) for arm in arms] for column, name in _CHANGES
    }
    return table_of({_MODEL: [arm.name for arm in arms], **changes})


def verdict_table(findings: Findings) -> Table:
    """The verdicts on the arms that have a reference; no row where none has."""
    arms = [arm for arm in findings.arms if arm.difference is not None]
    return table_of(
        {
            _MODEL: [arm.name for arm in arms],
            Column("Quality", numeric=False): [_cell(arm.quality, "kept", "lost") for arm in arms],
            Column("Largest rise", "nats", meaning="of the loss over the reference, over seeds"): [
                f"{max(arm.rises, default=nan):+.4f}" for arm in arms
            ],
            Column("F-Attn", numeric=False): [_fate(arm, "f_attn") for arm in arms],
            Column("M-Act", numeric=False): [_fate(arm, "m_act") for arm in arms],
            Column("Evidence", numeric=False): [
                f"{len(arm.rises)} seed{'s' * (len(arm.rises) != 1)}"
                + ("" if len(arm.rises) >= ENOUGH_SEEDS else ": no evidence yet")
                for arm in arms
            ],
        }
    )


def csv_text(findings: Findings) -> str:
    """A row for each number of each run."""
    rows: list[list[object]] = [["arm", "seed", "measure", "value"]]
    for arm in findings.arms:
        for run in arm.runs:
            rows += [[arm.name, run.seed, name, exact_text(value)] for name, value in run.measures.items()]
    return csv_of(rows)


def _perplexities(arm: Arm, measure: str) -> Spread | None:
    values = [perplexity(run.measures[measure]) for run in arm.runs if measure in run.measures]
    return spread(values) if values else None


def _scaled(found: Spread | None, unit: str) -> Spread | None:
    if found is None or unit != "%":
        return found
    return Spread(100 * found.mean, None if found.sd is None else 100 * found.sd, found.n, found.num_diverged)


def _cell(word: str, good: str, bad: str = "") -> Cell:
    tone: Tone = "good" if word == good else "bad" if word == bad else "muted"
    return Cell(word, tone)


def _fate(arm: Arm, measure: str) -> Cell:
    word, factors = arm.fate(measure), arm.factors.get(measure, ())
    cell = _cell(word, "removed")
    least = min(factors, default=nan)
    return cell._replace(text=f"{word}, {number_text(least, _THREE)}x less" if word in ("removed", "lower") else word)
