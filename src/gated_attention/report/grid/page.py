"""The report of a study of many points: a pure function of its records, as that of a comparison is."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gated_attention.report.blocks import (
    Block,
    Bullets,
    CodeBlock,
    Details,
    FigureBlock,
    Heading,
    Links,
    Paragraph,
    TableBlock,
    explained,
    figure_block,
    with_contents,
    write_document,
)
from gated_attention.report.command_line import source_name
from gated_attention.report.grid.across import across
from gated_attention.report.grid.figures import rate_curves
from gated_attention.report.grid.tables import csv_text, inside_table, loss_table, optimum_table
from gated_attention.report.plots import strokes_for
from gated_attention.report.study.appendix import origins
from gated_attention.report.study.figures import FOLDER
from gated_attention.report.study.page import unfinished, write_report
from gated_attention.report.tables import count_text
from gated_attention.study.grid.rates import FACTOR, Curve, Setting, find_settings, value_text
from gated_attention.study.grid.run import Failure, find_failures, find_points
from gated_attention.study.grid.structures import find_additions
from gated_attention.study.grid.study_file import STUDY_NAME
from gated_attention.study.record import METRICS_NAME, Result
from gated_attention.study.statistics import t_quantile
from gated_attention.train.metrics import read_metrics

NAMES = ("loss_by_rate", "m_act_by_rate")
"""Every figure that such a report may have."""


def write_study_report(study_folder: Path, report_folder: Path) -> list[Path]:
    """Write the report of a study: of its points if it has several, else as `write_report`.

    Raises:
        ValueError: as `write_report`.
    """
    points = find_points(study_folder)
    if not points:
        return write_report(study_folder, report_folder)
    found = [
        (result, read_metrics(point / result.variant / f"seed{result.seed}" / METRICS_NAME))
        for point, results in points.items()
        for result in results
    ]
    results, settings = [result for result, _ in found], find_settings(found)
    missing = [f"{name} at {point.name}" for point in points for name in unfinished(point)]
    blocks = _document(study_folder, report_folder, results, settings, find_failures(study_folder), missing)
    files = {"table.csv": csv_text(settings)}
    return write_document(
        report_folder, "report", with_contents(blocks), files, [f"{FOLDER}/{name}.svg" for name in NAMES]
    )


def _document(
    study_folder: Path,
    report_folder: Path,
    results: Sequence[Result],
    settings: Sequence[Setting],
    failures: Sequence[Failure],
    missing: Sequence[str],
) -> Iterator[Block]:
    name = (report_folder if study_folder.name == "records" else study_folder).resolve().name
    swatches = strokes_for(dict.fromkeys(curve.variant for setting in settings for curve in setting.curves))
    colors = {label: stroke.color for label, stroke in swatches.items()}
    optima, losses = optimum_table(settings), loss_table(settings)
    data = {"table.csv": "table.csv"}
    if study_folder.resolve().is_relative_to(report_folder.resolve()):
        data["records"] = study_folder.resolve().relative_to(report_folder.resolve()).as_posix()
    yield Heading(f"Gated attention study: {name}", level=1)
    yield _question(results, settings)
    yield Heading("Results")
    yield Bullets(list(_outcome(settings)))
    yield TableBlock(optima, colors)
    yield explained("What the columns mean", optima)
    yield Links("Data", data)
    yield from _missing(failures, missing)
    yield from across(settings)
    yield Heading("Figures")
    yield from _figures(settings)
    yield Heading("Every learning rate")
    yield Paragraph(
        "Validation loss in nats per token, or per image, mean over seeds ± standard deviation; a number in brackets "
        "is how many seeds there are if some are missing. Differences are paired over seeds, ± their standard error.",
        "note",
    )
    yield TableBlock(losses)
    activations = inside_table(settings, "m_act")
    if len(activations.columns) > 1 + any(setting.values for setting in settings):
        yield Details("M-Act, each layer's largest activation averaged over layers", [TableBlock(activations)])
    yield Heading("Limitations")
    yield Bullets(list(_limits(settings)))
    yield Heading("Reproduce")
    file = study_folder / STUDY_NAME
    if file.exists():
        yield CodeBlock(f"gated-attention study {STUDY_NAME}")
        text = re.sub(r'"(/[^"]*)"', lambda path: f'"{source_name(path[1])}"', file.read_text(encoding="utf-8"))
        yield Details(STUDY_NAME, [CodeBlock(text.rstrip(), "text")])
    yield origins(results)


def _question(results: Sequence[Result], settings: Sequence[Setting]) -> Paragraph:
    names = list(dict.fromkeys(curve.variant for setting in settings for curve in setting.curves))
    rates = sorted({rate for setting in settings for rate in setting.rates})
    number, tokens = len(results), max(result.tokens_seen for result in results)
    parameters = max(result.config.get("parameters", {}).get("total", 0) for result in results)
    span = f"learning rates from {value_text(rates[0])} to {value_text(rates[-1])}"
    text = f"What do {', '.join(f'`{name}`' for name in names)} reach at {span}, and what does a larger one cost them?"
    if len(rates) == 1:
        text = f"What do {', '.join(f'`{name}`' for name in names)} reach in {len(settings)} settings?"
    scale = f"{count_text(parameters)} parameters and {count_text(tokens)} tokens" if parameters else count_text(tokens)
    return Paragraph(f"{text} {number} runs, the largest of {scale}.", "lead")


def _outcome(settings: Sequence[Setting]) -> Iterator[str]:
    """What the rule says of each variant, and where the optima and the divergences are."""
    for setting in settings:
        at = f" ({setting.label})" if setting.label else ""
        for curve in setting.curves[1:] if len(setting.rates) > 1 else ():  # one rate tests no larger one
            yield _verdict(setting, curve, at)
        best = ", ".join(f"`{curve.variant}` {value_text(curve.best)}" for curve in setting.curves)
        edges = [f"`{curve.variant}`" for curve in setting.curves if curve.is_at_edge]
        note = f" At the edge of what was tried: {', '.join(edges)}." if edges else ""
        if len(setting.rates) > 1:
            yield f"**Best learning rate**{at}: {best}.{note}"
    diverged = {
        name: sum(len(curve.diverged) for setting in settings for curve in setting.curves if curve.variant == name)
        for name in dict.fromkeys(curve.variant for setting in settings for curve in setting.curves)
    }
    total = sum(diverged.values())
    listed = ", ".join(f"`{name}` {number}" for name, number in diverged.items())
    yield f"**Divergences**: {listed}." if total else "**Divergences**: none."


def _verdict(setting: Setting, curve: Curve, at: str) -> str:
    reference, low, high = setting.reference, setting.reference.best, setting.high
    found = setting.claim(curve)
    name = f"`{curve.variant}`"
    if found is None or found.n == 0 or high is None:
        wanted = f"{FACTOR:g} times the best rate of `{reference.variant}`, {value_text(FACTOR * low)}"
        return f"**{name}{at}: not judged.** No seed was trained with both at {wanted}, and at {value_text(low)}."
    rises = f"From {value_text(low)}, the best rate of `{reference.variant}`, to {value_text(high)}"
    if found.t is None or found.standard_error is None:
        return f"**{name}{at}: not judged.** {rises} its loss rises by {found.mean:+.4f} more: n = 1, no evidence."
    verdict = {"better": "confirmed", "worse": "the opposite holds"}.get(found.verdict, "not confirmed")
    return (
        f"**{name}{at}: {verdict}.** {rises}, its loss rises by {abs(found.mean):.4f} ± {found.standard_error:.4f} "
        f"nats {'less' if found.mean < 0 else 'more'} than that of `{reference.variant}` (n = {found.n}, "
        f"t = {found.t:+.1f}, significant if |t| > {t_quantile(found.n - 1):.2f})."
    )


def _missing(failures: Sequence[Failure], missing: Sequence[str]) -> Iterator[Block]:
    if failures:
        plural = "s" * (len(failures) > 1)
        yield Paragraph(f"{len(failures)} arm{plural} failed; the study tries again when it is run again.", "note")
        yield Bullets([str(failure) for failure in failures])
    failed = {f"{one.variant} seed {one.seed} at {one.point}" for one in failures}
    rest = [name for name in missing if name not in failed]
    if rest:
        listed = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        yield Paragraph(f"Begun and not finished: {listed}.", "note")


def _figures(settings: Sequence[Setting]) -> Iterator[FigureBlock]:
    strokes = strokes_for(dict.fromkeys(curve.variant for setting in settings for curve in setting.curves))
    caption = (
        "Dots are seeds, lines go through their means, thin where seeds are missing. A ring marks the lowest mean of "
        "all seeds. A cross at the top is a run that diverged or lies above the frame; the line leaves its rate out."
    )
    figure = rate_curves(settings, strokes, lambda curve, rate: curve.losses[rate], "Validation loss (nats)")
    yield figure_block(f"{FOLDER}/loss_by_rate.svg", figure, "Loss against learning rate", caption)
    if any(curve.values("m_act", rate) for one in settings for curve in one.curves for rate in curve.losses):
        figure = rate_curves(settings, strokes, lambda curve, rate: curve.values("m_act", rate), "M-Act", log=True)
        caption = "M-Act of the same runs, each layer's largest activation averaged over layers, on a logarithmic axis."
        yield figure_block(f"{FOLDER}/m_act_by_rate.svg", figure, "Largest activation against learning rate", caption)


def _limits(settings: Sequence[Setting]) -> Iterator[str]:
    curves = [curve for setting in settings for curve in setting.curves]
    seeds = [len(losses) for curve in curves for losses in curve.losses.values()]
    number = str(min(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    each = f"{number} seed{'s' * (max(seeds) > 1)} at each point"
    yield f"{each}: the spread itself is an estimate, and small effects stay hidden."
    common = [len(setting.common_rates) for setting in settings]
    if any(count < len(setting.rates) for count, setting in zip(common, settings, strict=True)):
        counts = ", ".join(map(str, common))
        yield f"Sensitivity is over the rates at which every variant has every seed: {counts} of them."
    additions = find_additions(settings)
    judged = sum(len(setting.curves) - 1 for setting in settings if len(setting.rates) > 1)
    judged += len(additions) + sum(one.interaction is not None for one in additions)
    if judged > 1:
        yield f"{judged} claims are tested at 5 % each, without correction."
    if any(len(setting.rates) > 1 for setting in settings):
        yield "The best rate is chosen among those that were tried, on the held-out text that is also reported."
