"""A report in words: what came out, and how to read the table."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from gated_attention.analysis.definitions import ALL
from gated_attention.analysis.measures import MASSIVE
from gated_attention.registry.choices import TEXT
from gated_attention.registry.variants import BASELINE
from gated_attention.report.blocks import Bullets, Paragraph
from gated_attention.report.command_line import source_name
from gated_attention.report.curves import Curve
from gated_attention.report.study.columns import REMOVED_SHARE, SINK_FACTOR
from gated_attention.report.study.table import spread_text
from gated_attention.report.tables import ABSENT, count_text, fixed, number_text, significant
from gated_attention.study.comparison import LOSS, Comparison, VariantRow, diverged
from gated_attention.study.record import Result
from gated_attention.study.statistics import paired_difference, t_quantile

MANY = 4
"""More comparisons than this are grouped instead of told one by one."""


def outcome(results: Sequence[Result], comparison: Comparison, differences: Mapping[str, Curve]) -> Bullets:
    """The results: a bullet for each variant's loss, then its course, sinks, activations and cost.

    Args:
        differences: From `figures.validation_differences`.
    """
    compared = [row for row in comparison.rows if row.difference]
    if not compared:
        losses = {row.variant: spread_text(row.measures.get(LOSS), fixed(4)) for row in comparison.rows}
        items = [f"`{name}`, validation loss in {comparison.unit}: {loss}." for name, loss in losses.items()]
    elif len(compared) <= MANY:
        items = [_loss_sentence(row, comparison.reference, comparison.unit) for row in compared]
    else:
        items = list(_loss_by_verdict(compared, comparison.reference, comparison.unit))
    found = (
        _paired("Accuracy", "accuracy", comparison, {"worse": "higher", "better": "lower"}),
        _course(differences, "text" if comparison.task == TEXT else "data"),
        _sink(comparison),
        _paired("No-op sinks", "no_op_sink", comparison, {"worse": "more", "better": "fewer"}),
        _paired("Broadcast sinks", "broadcast_sink", comparison, {"worse": "more", "better": "fewer"}),
        _activations(results, comparison),
        _open(comparison),
        _experts(comparison),
        _speed(comparison),
    )
    return Bullets([*items, *filter(None, found)])


def _loss_sentence(row: VariantRow, reference: str | None, unit: str) -> str:
    found = row.difference
    if found is None or found.n == 0:
        verdict = found.verdict if found else ABSENT
        return f"**`{row.variant}`** cannot be compared with `{reference}`: {verdict}."
    size, lower = f"{abs(found.mean):.4f}", "lower" if found.mean < 0 else "higher"
    lost = f" In {found.num_lost} of {found.n + found.num_lost} pairs a run diverged." if found.num_lost else ""
    if found.t is None or found.standard_error is None:
        return (
            f"**`{row.variant}`** ended {size} {unit} {lower} than `{reference}` in one pair of runs: "
            f"with n = 1 there is no spread, so this is not evidence.{lost}"
        )
    relation = f"of `{reference}`:" if found.verdict == "within noise" else f"than `{reference}`: loss"
    return (
        f"**`{row.variant}`** is **{found.verdict}** {relation} {lower} by {size} ± {found.standard_error:.4f} "
        f"{unit} (n = {found.n}, t = {found.t:+.1f}, significant if |t| > {t_quantile(found.n - 1):.2f}).{lost}"
    )


def _loss_by_verdict(rows: Sequence[VariantRow], reference: str | None, unit: str) -> Iterator[str]:
    """A bullet for each verdict with its variants, lowest loss first."""
    found = [(row.variant, row.difference) for row in rows if row.difference]
    found.sort(key=lambda item: (item[1].n == 0, item[1].mean if item[1].n else 0.0))
    for verdict in dict.fromkeys(difference.verdict for _, difference in found):
        listed = ", ".join(
            f"`{name}` {d.mean:+.4f}" if d.n else f"`{name}`" for name, d in found if d.verdict == verdict
        )
        title = verdict.replace("n = 1:", "one pair of runs each,").capitalize()
        yield f"**{title}**, against `{reference}` in {unit}: {listed}."


def _course(differences: Mapping[str, Curve], read: str) -> str | None:
    """Whether a difference grows or shrinks: at half of the steps, and at the end."""
    moved = []
    for variant, (steps, values) in differences.items():
        half = int(abs(steps - steps[-1] / 2).argmin())
        if half < len(steps) - 1:
            moved.append(f"`{variant}` {values[half]:+.4f} at step {steps[half]:,}, {values[-1]:+.4f} at {steps[-1]:,}")
    if not moved or len(moved) > MANY:
        return None
    return f"**During training** the difference moved, on less {read} than in the table: {'; '.join(moved)}."


def _sink(comparison: Comparison) -> str | None:
    reference, *others = comparison.rows
    share, uniform = reference.mean("f_attn"), reference.mean("f_attn_uniform")
    if share is None or not uniform:
        return None
    text = (
        f"**Attention sink:** `{reference.variant}` puts {share:.4f} of its attention on the first token, "
        f"{share / uniform:.1f} times the {uniform:.4f} of uniform attention"
    )
    if share < SINK_FACTOR * uniform:
        return f"{text}. Below {SINK_FACTOR:.0f} times this is no sink, so the study cannot show that one is removed."
    found = [
        f"`{name}` {value:.4f} ({'removed' if value <= REMOVED_SHARE * share else 'not removed'})"
        for name, value in _means(others, "f_attn").items()
    ]
    rest = f" The others: {', '.join(found)}; removed means a third or less." if found else ""
    return f"{text}: a sink.{rest}"


def _paired(title: str, measure: str, comparison: Comparison, words: Mapping[str, str]) -> str | None:
    """A measure of each variant, and its paired difference from the reference's with the verdict in these words."""
    reference, *others = comparison.rows
    if (before := reference.mean(measure)) is None:
        return None
    found = []
    for row in others:
        difference = paired_difference(row.values.get(measure, {}), reference.values[measure])
        if difference.n:
            error = "" if difference.standard_error is None else f" ± {difference.standard_error:.4f}"
            verdict = words.get(difference.verdict, difference.verdict)
            found.append(f"`{row.variant}` {row.mean(measure):.4f} ({difference.mean:+.4f}{error}, {verdict})")
    meaning = f" ({ALL[measure].text})" if measure in ALL else ""
    return f"**{title}**{meaning}: `{reference.variant}` {before:.4f}{''.join(f', {one}' for one in found)}."


def _activations(results: Sequence[Result], comparison: Comparison) -> str | None:
    found = _means(comparison.rows, "m_act")
    if not found:
        return None
    runs = [(run.variant, run.measures["m_act"]) for run in results if "m_act" in run.measures and not diverged(run)]
    largest, variant = max((max(measure.per_layer or (measure.value,)), variant) for variant, measure in runs)
    comment = "none is massive, which" if largest < MASSIVE else "massive"
    return (
        f"**M-Act**, each layer's largest activation averaged over layers: {_listed(found, _activation)}. "
        f"The largest of any layer is {_activation(largest)}, of `{variant}`; {comment} starts at {MASSIVE:.0f}."
    )


def _activation(value: float) -> str:
    return number_text(value, significant(3))


def _open(comparison: Comparison) -> str | None:
    found = _means(comparison.rows, "gate_open_share")
    shares = _listed(found, lambda share: f"{100 * share:.1f} %") if found else None
    return shares and f"**Open gates**, the others exactly 0: {shares}."


def _experts(comparison: Comparison) -> str | None:
    found = _means(comparison.rows, "expert_load_max")
    if not found:
        return None
    dead = ", ".join(
        f"`{name}` {value:.3g}" for name, value in _means(comparison.rows, "dead_experts").items() if value
    )
    return (
        "**Expert load**: the busiest expert of any layer gets, in shares of an even split, "
        f"{_listed(found, '{:.2f}'.format)}. "
        f"{f'Experts that no token reaches: {dead}.' if dead else 'Every expert gets tokens.'}"
    )


def _speed(comparison: Comparison) -> str | None:
    reference, *others = comparison.rows
    speed = reference.mean("train_tokens_per_s")
    if not speed or not (found := _means(others, "train_tokens_per_s")):
        return None
    shares = {name: 100 * value / speed for name, value in found.items()}
    return (
        f"**Training speed** against `{reference.variant}` ({speed:,.0f} tokens/s): "
        f"{_listed(shares, 'at {:.0f} %'.format)}. Other work on a device slows its runs: speeds show what this study "
        "cost, not what a gate costs."
    )


def _means(rows: Sequence[VariantRow], measure: str) -> dict[str, float]:
    """Mean of a measure by variant, where there is one."""
    return {row.variant: value for row in rows if (value := row.mean(measure)) is not None}


def _listed(found: Mapping[str, float], text: Callable[[float], str]) -> str:
    """Variants with their values; of many, the lowest and the highest value."""
    if len(found) <= MANY + 1:
        return ", ".join(f"`{name}` {text(value)}" for name, value in found.items())
    low, *_, high = sorted(found.items(), key=lambda item: item[1])
    return f"from `{low[0]}` {text(low[1])} to `{high[0]}` {text(high[1])}"


def table_notes(results: Sequence[Result], comparison: Comparison, unfinished: Sequence[str]) -> Iterator[Paragraph]:
    """How to read the comparison table, and what is missing from it or unequal in it."""
    several = max(len(row.seeds) for row in comparison.rows) > 1
    text = "± after a mean is the standard deviation over seeds. " if several else "One run each, so no spread. "
    if comparison.reference and several:
        text += "± after a difference is the standard error of its mean. "
    if not comparison.reference:
        text += "There is no second variant to compare with, so the paired columns are left out. "
    shares = "F-Attn" if comparison.task == TEXT else "Accuracy, attention, sinks"
    yield Paragraph(f"{text}{shares} and the columns on gates are shares from 0 to 1.", "note")
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


def scale_text(results: Sequence[Result], comparison: Comparison) -> str:
    """Parameters of the largest variant, where records have them, and tokens of the longest run."""
    parameters = max((row.parameters or 0 for row in comparison.rows), default=0)
    tokens = f"{count_text(max(run.tokens_seen for run in results))} tokens"
    return f"{count_text(parameters)} parameters and {tokens}" if parameters else tokens
