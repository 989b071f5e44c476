"""What a study of several settings says across them: what a gate adds to each structure, and loss against compute."""

from collections.abc import Iterator, Sequence

from gated_attention.report.blocks import Block, Heading, Paragraph, TableBlock, explained
from gated_attention.report.study.columns import VARIANT
from gated_attention.report.study.table import difference_text, verdict_tone
from gated_attention.report.tables import Cell, Column, Table, number_text, table_of
from gated_attention.study.grid.rates import Setting
from gated_attention.study.grid.scaling import Scaling, find_scaling
from gated_attention.study.grid.structures import Addition, find_additions
from gated_attention.study.statistics import PairedDifference

_GAIN = Column(
    "Gate minus none", "nats", better="lower",
    meaning="validation loss with the gate minus that of the same structure without it, paired over seeds, ± the "
    "standard error of the mean",
)  # fmt: skip
_INTERACTION = Column(
    "Minus the plain gain", "nats", beneath=True,
    meaning="that difference minus the one in the plain structure, paired over seeds: above 0 the gate adds less here "
    "than to the plain model, below 0 more",
)  # fmt: skip
_SLOPE = Column(
    "Slope", "nats per factor of 10", better="lower",
    meaning="of a least-squares line of validation loss against the logarithm of training operations, a point per "
    "setting, a line per seed; mean over seeds, at the variant's best learning rate of each setting",
)  # fmt: skip


def across(settings: Sequence[Setting]) -> Iterator[Block]:
    """Sections on what only several settings show; nothing where they do not."""
    if additions := find_additions(settings):
        yield Heading("What a gate adds to each structure")
        yield Paragraph(
            "Each row is a variant with a gate and the same one without it. If the gate's gain were what a plain "
            "model lacks, it would be smaller in structures that bring it; the second column tests that.",
        )
        yield TableBlock(table := additions_table(additions))
        yield explained("What the columns mean", table)
    if scaling := find_scaling(settings):
        yield Heading("Loss against compute")
        yield TableBlock(table := scaling_table(scaling))
        yield explained("What the columns mean", table)


def additions_table(additions: Sequence[Addition]) -> Table:
    """A row for each gate in each structure."""
    gains = [one.gain for one in additions]
    return table_of(
        {
            Column("Structure", numeric=False): [one.base.variant for one in additions],
            Column("Setting", numeric=False): [one.setting.label for one in additions],
            Column("With the gate", numeric=False): [one.gated.variant for one in additions],
            _GAIN: [Cell(difference_text(gain), verdict_tone(gain)) if gain.n else None for gain in gains],
            Column("Verdict", numeric=False, beneath=True): [_verdict(gain) for gain in gains],
            _INTERACTION: [_difference(one.interaction) for one in additions],
            Column("Differs", numeric=False, beneath=True): [_differs(one.interaction) for one in additions],
        }
    )


def scaling_table(scaling: Sequence[Scaling]) -> Table:
    """A row for each variant."""
    reference, *rest = scaling
    return table_of(
        {
            VARIANT: [one.variant for one in scaling],
            Column("Settings"): [str(len(one.flops)) for one in scaling],
            Column("Operations", numeric=False): [f"{min(one.flops):.2g} to {max(one.flops):.2g}" for one in scaling],
            _SLOPE: [number_text(one.slope, 4, "+") for one in scaling],
            Column(
                "95 % interval",
                beneath=True,
                meaning="of the slope when seeds are drawn with replacement; few seeds make it too narrow",
            ): [_interval(one) for one in scaling],
            Column(
                "Minus the reference's",
                "nats per factor of 10",
                better="lower",
                meaning="paired over seeds, ± the standard error of the mean; below 0 the gain grows with compute",
            ): [None, *(_difference(one.minus(reference)) for one in rest)],
            Column("Verdict", numeric=False, beneath=True): [None, *(_verdict(one.minus(reference)) for one in rest)],
        }
    )


def _verdict(found: PairedDifference) -> str:
    return found.verdict if found.t is None else f"{found.verdict} (t = {found.t:+.1f}, n = {found.n})"


def _difference(found: PairedDifference | None) -> str | None:
    return difference_text(found) if found and found.n else None


def _differs(found: PairedDifference | None) -> str | None:
    """The sign of an interaction in words, by the rule of all paired differences."""
    if found is None or not found.n:
        return None
    words = {"better": "adds more", "worse": "adds less"}.get(found.verdict, found.verdict)
    return words if found.t is None else f"{words} (t = {found.t:+.1f}, n = {found.n})"


def _interval(one: Scaling) -> str | None:
    return None if one.interval is None else f"{one.interval[0]:+.4f} to {one.interval[1]:+.4f}"
