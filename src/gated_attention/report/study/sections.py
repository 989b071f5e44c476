"""A report in words: what came out, and how to read the table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from gated_attention.report.blocks import Bullets, Paragraph
from gated_attention.report.plots import Curve
from gated_attention.report.study.table import spread_text
from gated_attention.report.tables import ABSENT, fixed, significant
from gated_attention.study.comparison import BASELINE, LOSS, Comparison, VariantRow, diverged
from gated_attention.study.record import Result
from gated_attention.study.statistics import CONFIDENCE, t_quantile

SINK_FACTOR = 10.0
"""F-Attn over its uniform value from which a model counts as having an attention sink."""

REMOVED_SHARE = 1 / 3
"""A sink counts as removed if F-Attn falls to this share of the reference's."""

MANY = 4
"""More comparisons than this are grouped instead of told one by one."""

VERDICT_TITLES = {
    "better": "Better",
    "worse": "Worse",
    "within noise": "Within noise",
    "diverged": "Diverged",
    "n = 1: no spread, not evidence": "One pair of runs each, no spread, not evidence",
    "no common seed": "No common seed",
}

MASSIVE = 100.0
"""Activations below this do not count as massive (Sun et al., arXiv 2402.17762)."""


def outcome(results: Sequence[Result], comparison: Comparison, differences: Mapping[str, Curve]) -> Bullets:
    """What came out, a bullet for each variant's loss, then its course, sinks, activations and cost.

    Args:
        differences: From `figures.validation_differences`.
    """
    compared = [row for row in comparison.rows if row.difference]
    if not compared:
        items = [f"`{row.variant}`: validation loss {_loss_text(row)}." for row in comparison.rows]
    elif len(compared) <= MANY:
        items = [_loss_sentence(row, comparison.reference) for row in compared]
    else:
        items = list(_loss_by_verdict(compared, comparison.reference))
    reference = comparison.rows[0]
    found = (
        _course(differences),
        _sink(reference, comparison),
        _activations(results, comparison),
        _open(comparison),
        _experts(comparison),
    )
    items += [item for item in (*found, _cost(comparison)) if item]
    return Bullets(items)


def _loss_text(row: VariantRow) -> str:
    text = spread_text(row.measures.get(LOSS), fixed(4))
    return text if text in (ABSENT, "diverged") else f"{text} nats/token"


def _loss_sentence(row: VariantRow, reference: str | None) -> str:
    found = row.difference
    if found is None or found.n == 0:
        verdict = found.verdict if found else ABSENT
        return f"**`{row.variant}`** cannot be compared with `{reference}`: {verdict}."
    size, lower = f"{abs(found.mean):.4f}", "lower" if found.mean < 0 else "higher"
    lost = f" In {found.num_lost} of {found.n + found.num_lost} pairs a run diverged." if found.num_lost else ""
    if found.t is None or found.standard_error is None:
        return (
            f"**`{row.variant}`** ended {size} nats/token {lower} than `{reference}` in one pair of runs: "
            f"with n = 1 there is no spread, so this is not evidence.{lost}"
        )
    numbers = f"{size} ± {found.standard_error:.4f} nats/token"
    test = f"n = {found.n}, t = {found.t:+.1f}, counts from |t| > {t_quantile(found.n - 1):.2f}"
    verdict = found.verdict
    if verdict == "within noise":
        return f"**`{row.variant}`** is **within noise** of `{reference}`: {lower} by {numbers} ({test}).{lost}"
    return f"**`{row.variant}`** is **{verdict}** than `{reference}`: loss {lower} by {numbers} ({test}).{lost}"


def _loss_by_verdict(rows: Sequence[VariantRow], reference: str | None) -> Iterator[str]:
    """A bullet for each verdict with its variants, lowest loss first."""
    found = [(row.variant, row.difference) for row in rows if row.difference]
    found.sort(key=lambda item: (item[1].n == 0, item[1].mean if item[1].n else 0.0))
    for verdict in dict.fromkeys(difference.verdict for _, difference in found):
        listed = ", ".join(
            f"`{name}` {d.mean:+.4f}" if d.n else f"`{name}`" for name, d in found if d.verdict == verdict
        )
        yield f"**{VERDICT_TITLES[verdict]}**, against `{reference}` in nats/token: {listed}."


def _course(differences: Mapping[str, Curve]) -> str | None:
    """Whether a lead grows or shrinks: where half of the steps are done, and at the end."""
    moved = []
    for variant, (steps, values) in differences.items():
        half = int(abs(steps - steps[-1] / 2).argmin())
        if half < len(steps) - 1:
            moved.append(f"`{variant}` {values[half]:+.4f} at step {steps[half]:,}, {values[-1]:+.4f} at {steps[-1]:,}")
    if not moved or len(moved) > MANY:
        return None
    return f"**While training went on** the difference moved, on less text than in the table: {'; '.join(moved)}."


def _sink(reference: VariantRow, comparison: Comparison) -> str | None:
    share, uniform = reference.mean("f_attn"), reference.mean("f_attn_uniform")
    if share is None or not uniform:
        return None
    text = (
        f"**Attention sink:** `{reference.variant}` puts {share:.4f} of its attention on the first token, "
        f"{share / uniform:.1f} times the {uniform:.4f} of uniform attention"
    )
    if share < SINK_FACTOR * uniform:
        return f"{text}. Below {SINK_FACTOR:.0f} times this is no sink, so the study cannot show that one is removed."
    others = [
        f"`{row.variant}` {found:.4f} ({'removed' if found <= REMOVED_SHARE * share else 'not removed'})"
        for row in comparison.rows[1:]
        if (found := row.mean("f_attn")) is not None
    ]
    rest = f" The others: {', '.join(others)}; removed means a third or less." if others else ""
    return f"{text}: a sink.{rest}"


def _activations(results: Sequence[Result], comparison: Comparison) -> str | None:
    found = [(row.variant, value) for row in comparison.rows if (value := row.mean("m_act")) is not None]
    if not found:
        return None
    listed = _listed([(name, value, activation_text(value)) for name, value in found])
    single = [
        (max(run.measures["m_act"].per_layer or (run.measures["m_act"].value,)), run.variant)
        for run in results
        if "m_act" in run.measures and not diverged(run)
    ]
    largest, variant = max(single)
    comment = f"none is massive, which starts at {MASSIVE:.0f}" if largest < MASSIVE else "massive starts at 100"
    return (
        f"**M-Act**, each layer's largest activation averaged over layers: {listed}. "
        f"The largest of any layer is {activation_text(largest)}, of `{variant}`; {comment}."
    )


def activation_text(value: float) -> str:
    """An activation with three significant digits."""
    return f"{value:,.{significant(3)(value)}f}"


def _open(comparison: Comparison) -> str | None:
    found = [(row.variant, value) for row in comparison.rows if (value := row.mean("gate_open_share")) is not None]
    if not found:
        return None
    listed = _listed([(name, value, f"{100 * value:.1f} %") for name, value in found])
    return f"**Gates that are open**, the others exactly 0: {listed}."


def _experts(comparison: Comparison) -> str | None:
    found = [(row.variant, value) for row in comparison.rows if (value := row.mean("expert_load_max")) is not None]
    if not found:
        return None
    listed = _listed([(name, value, f"{value:.2f}") for name, value in found])
    dead = [(row.variant, value) for row in comparison.rows if (value := row.mean("dead_experts"))]
    rest = ", ".join(f"`{name}` {value:.3g}" for name, value in dead)
    return (
        f"**Expert load**: the busiest expert of any layer gets, in shares of an even split, {listed}. "
        f"{f'Experts that no token reaches: {rest}.' if dead else 'Every expert gets tokens.'}"
    )


def _cost(comparison: Comparison) -> str | None:
    reference, *others = comparison.rows
    speed = reference.mean("train_tokens_per_s")
    shares = [
        (row.variant, found, f"at {100 * found / speed:.0f} %")
        for row in others
        if speed and (found := row.mean("train_tokens_per_s")) is not None
    ]
    if not shares:
        return None
    return f"**Training speed** against `{reference.variant}` ({speed:,.0f} tokens/s): {_listed(shares)}."


def _listed(entries: Sequence[tuple[str, float, str]]) -> str:
    """Names with their printed values; of many, the lowest and the highest value."""
    if len(entries) > MANY + 1:
        entries = sorted(entries, key=lambda entry: entry[1])
        return f"from `{entries[0][0]}` {entries[0][2]} to `{entries[-1][0]}` {entries[-1][2]}"
    return ", ".join(f"`{name}` {text}" for name, _, text in entries)


def table_notes(results: Sequence[Result], comparison: Comparison, unfinished: Sequence[str]) -> Iterator[Paragraph]:
    """How to read the comparison table, and what is missing from it or unequal in it."""
    several = max(len(row.seeds) for row in comparison.rows) > 1
    text = "± after a mean is the standard deviation over seeds. " if several else "One run each, so no spread. "
    if comparison.reference:
        text += f"Difference: validation loss minus that of `{comparison.reference}` with the same seed, less is better"
        text += "; ± there is the standard error of the mean. " if several else ". "
        text += (
            f"It counts as confirmed when |t| exceeds the two-sided {100 * CONFIDENCE:.0f} % quantile of Student's t "
            "for n - 1 degrees of freedom, 4.30 at n = 3. "
        )
    else:
        text += "There is no second variant to compare with, so the paired columns are left out. "
    yield Paragraph(text + "F-Attn, gate mean and their like are shares from 0 to 1.", "note")
    if comparison.reference and comparison.reference != BASELINE:
        yield Paragraph(f"No variant is named `baseline`; `{comparison.reference}` stands in for it.", "note")
    lost = [f"`{run.variant}` seed {run.seed}" for run in results if diverged(run)]
    if lost:
        yield Paragraph(
            f"**Diverged** ({len(lost)} of {len(results)} runs): {', '.join(lost)}. "
            "Means and differences leave these runs out, which flatters a variant that diverges."
        )
    if unfinished:
        yield Paragraph(f"**Not finished, left out:** {', '.join(f'`{name}`' for name in unfinished)}.")
    unequal = list(_unequal_settings(results))
    if unequal:
        yield Paragraph(f"**The runs do not share one setting:** {'; '.join(unequal)}.")


def _unequal_settings(results: Sequence[Result]) -> Iterator[str]:
    """Settings beyond the variant in which the runs differ, each with its values."""
    flat = [
        {
            **{f"{part}.{key}": value for part in ("data", "train") for key, value in run.config.get(part, {}).items()},
            "device": run.device,
            "commit": run.git_commit,
            "tokens": run.tokens_seen,
            **{f"version of {name}": version for name, version in run.versions.items()},
        }
        for run in results
    ]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = dict.fromkeys(source_name(str(settings.get(key))) for settings in flat)
        if len(values) > 1:
            yield f"`{key}` is {' or '.join(values)}"


def count_text(count: int) -> str:
    """A count in words of three digits: 8,192, 492k, 1.21M, 3.50B."""
    if count < 10_000:
        return f"{count:,}"
    scaled = ((float(f"{count / size:.3g}"), unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")))
    value, unit = next((value, unit) for value, unit in scaled if value >= 1.0)
    return f"{value:.{significant(3)(value)}f}{unit}"


def parameters_text(comparison: Comparison) -> str:
    """The largest variant's parameters in words, with a space behind; empty where no run records them."""
    largest = max((row.parameters or 0 for row in comparison.rows), default=0)
    return f"{count_text(largest)} parameters " if largest else ""


def source_name(source: str) -> str:
    """A data source without the folders of the machine it was read on; hub names stay whole."""
    return PurePath(source).name if PurePath(source).is_absolute() else source
