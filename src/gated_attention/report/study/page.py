"""The report of a study: a pure function of its runs and of the paper's numbers.

Neither clock nor machine enters: the same runs give the same bytes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from gated_attention.files import write_all, writing_to
from gated_attention.report.blocks import Block, FigureBlock, Heading, Paragraph, TableBlock, html, markdown
from gated_attention.report.plots import Stroke, strokes_for
from gated_attention.report.study import appendix, lead, sections
from gated_attention.report.study import beside_the_paper as beside
from gated_attention.report.study.figures import FOLDER, NAMES, Run, study_figures, validation_differences
from gated_attention.report.study.forest import forest
from gated_attention.report.study.strip import result_strip, strip_note
from gated_attention.report.study.table import comparison_table, csv_text
from gated_attention.study.comparison import Comparison, compare_variants
from gated_attention.study.record import (
    ARRAYS_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    RESULT_NAME,
    Result,
    find_results,
    read_arrays,
)
from gated_attention.train.metrics import read_metrics


def write_report(study_folder: Path, report_folder: Path) -> list[Path]:
    """Write `report.md`, `report.html`, `table.csv` and `figures/*.svg`, over those of an earlier report.

    Args:
        study_folder: `runs/<study>`, with `<variant>/seed<k>/result.json` below it.
        report_folder: Where the report goes; made if it is not there. Other files in it are left alone.

    Returns:
        What was written, `report.md` first.

    Raises:
        ValueError: if there is no finished run, a file of a run is not readable, or nothing can be written.
    """
    results = find_results(study_folder)
    if not results:
        raise ValueError(f"no finished run below {study_folder}; run `gated-attention compare` first")
    comparison = compare_variants(results)
    arms = {
        row.variant: [_run(study_folder, result) for result in results if result.variant == row.variant]
        for row in comparison.rows
    }
    ordered = [run.result for runs in arms.values() for run in runs]
    title = f"Gated attention study: {results[0].study}"
    figures = list(study_figures(arms, comparison.reference))
    strokes = strokes_for(arms)
    colors = {label: stroke.color for label, stroke in strokes.items()}
    glance = list(_glance(comparison, strokes))
    drawn = [block for block in (*glance, *figures) if isinstance(block, FigureBlock)]
    blocks: list[Block] = [
        Heading(title, level=1),
        lead.lead(ordered, comparison),
        Heading("Results"),
        *glance,
        sections.outcome(ordered, comparison, validation_differences(arms, comparison.reference)),
        TableBlock(comparison_table(comparison), colors),
        *sections.table_notes(ordered, comparison, _unfinished(study_folder)),
        *([Paragraph(note, "note")] if (note := lead.held_out_note(ordered)) else []),
        Heading("Figures"),
        *figures,
        *beside.beside_paper(ordered, comparison),
        *appendix.every_run(ordered),
        *appendix.definitions(comparison),
        *appendix.limits(ordered, comparison),
        *appendix.reproduction(ordered, comparison),
    ]
    files = {"report.md": markdown(blocks), "report.html": html(title, blocks), "table.csv": csv_text(comparison)}
    return _write(report_folder, files | {figure.path: figure.svg for figure in drawn})


def _glance(comparison: Comparison, strokes: Mapping[str, Stroke]) -> Iterator[Block]:
    """The results in one view, where there is something to compare."""
    if comparison.reference:
        yield TableBlock(result_strip(comparison), {label: stroke.color for label, stroke in strokes.items()})
        if figure := forest(comparison, strokes):
            yield figure
        yield Paragraph(strip_note(comparison), "note")


def _run(study_folder: Path, result: Result) -> Run:
    folder = study_folder / result.variant / f"seed{result.seed}"
    return Run(result, read_metrics(folder / METRICS_NAME), read_arrays(folder / ARRAYS_NAME))


def _unfinished(study_folder: Path) -> list[str]:
    """Runs that were begun and have no result, as `<variant> seed <k>`."""
    begun = sorted(path.parent for path in study_folder.glob(f"*/seed*/{CONFIG_NAME}"))
    return [
        f"{folder.parent.name} seed {folder.name.removeprefix('seed')}"
        for folder in begun
        if not (folder / RESULT_NAME).exists()
    ]


def _write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write the files, and remove figures of an earlier report that this one does not have."""
    with writing_to(folder):
        return write_all(folder, files, stale=[f"{FOLDER}/{name}.svg" for name in ("forest", *NAMES)])
