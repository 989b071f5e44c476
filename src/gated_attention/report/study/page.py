"""The report of a study: a pure function of its runs and of the paper's numbers.

Neither clock nor machine enters: the same runs give the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gated_attention.registry.choices import TEXT
from gated_attention.report.blocks import (
    Block,
    CodeBlock,
    Details,
    Heading,
    Links,
    Paragraph,
    TableBlock,
    explained,
    with_contents,
    write_document,
)
from gated_attention.report.plots import strokes_for
from gated_attention.report.study import appendix, lead, sections
from gated_attention.report.study.beside_the_paper import beside_paper
from gated_attention.report.study.figures import FOLDER, NAMES, Arms, Run, forest, study_figures, validation_differences
from gated_attention.report.study.strip import result_strip
from gated_attention.report.study.table import comparison_table, csv_text
from gated_attention.study.comparison import compare_variants
from gated_attention.study.record import (
    ARRAYS_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    RESULT_NAME,
    Result,
    find_results,
    read_arrays,
)
from gated_attention.study.samples import SAMPLES_NAME, read_samples
from gated_attention.train.metrics import read_metrics


def write_report(study_folder: Path, report_folder: Path) -> list[Path]:
    """Write `report.md`, `report.html`, `table.csv` and `figures/*.svg`, over those of an earlier report.

    Args:
        study_folder: `runs/<study>`, with `<variant>/seed<k>/result.json` below it.
        report_folder: Where the report goes; made if need be. Other files in it stay.

    Returns:
        What was written, `report.md` first.

    Raises:
        ValueError: if there is no finished run, a file of a run is not readable, or nothing can be written.
    """
    results = find_results(study_folder)
    if not results:
        raise ValueError(f"no finished run below {study_folder}; run `gated-attention compare` first")
    files = {"table.csv": "table.csv"}
    if study_folder.resolve().is_relative_to(report_folder.resolve()):
        files["records"] = study_folder.resolve().relative_to(report_folder.resolve()).as_posix()
    blocks = with_contents(_document(study_folder, results, files))
    table = {"table.csv": csv_text(compare_variants(results))}
    return write_document(report_folder, "report", blocks, table, [f"{FOLDER}/{name}.svg" for name in NAMES])


def _document(study_folder: Path, results: Sequence[Result], files: Mapping[str, str]) -> Iterator[Block]:
    comparison = compare_variants(results)
    arms: dict[str, list[Run]] = {row.variant: [] for row in comparison.rows}
    for result in results:
        folder = study_folder / result.variant / f"seed{result.seed}"
        run = Run(
            result,
            read_metrics(folder / METRICS_NAME),
            read_arrays(folder / ARRAYS_NAME),
            read_samples(folder / SAMPLES_NAME),
        )
        arms[result.variant].append(run)
    ordered = [run.result for runs in arms.values() for run in runs]
    strokes = strokes_for(arms)
    colors = {label: stroke.color for label, stroke in strokes.items()}
    yield Heading(f"Gated attention study: {results[0].study}", level=1)
    yield lead.question(ordered, comparison)
    yield Heading("Results")
    compared = comparison_table(comparison)
    if comparison.reference:
        strip = result_strip(comparison)
        yield TableBlock(strip, colors)
        if figure := forest(comparison, strokes):
            yield figure
        yield explained("What the columns mean", strip)
    yield sections.outcome(ordered, comparison, validation_differences(arms, comparison.reference))
    yield TableBlock(compared, colors)
    yield Links("Data", files)
    yield from sections.table_notes(ordered, comparison, unfinished(study_folder))
    yield from appendix.cost(ordered, comparison)
    yield from lead.setup(ordered, comparison)
    yield Heading("Figures")
    yield from study_figures(arms, comparison)
    yield from sample_generations(arms)
    if comparison.task == TEXT:
        yield from beside_paper(ordered, comparison)
    yield from appendix.every_run(ordered, comparison)
    yield Heading("Definitions")
    yield explained("All measures", compared)
    yield from appendix.limits(ordered, comparison)
    yield from appendix.reproduction(ordered, comparison)


def unfinished(study_folder: Path) -> list[str]:
    """Runs that were begun and have no result, as `<variant> seed <k>`."""
    begun = sorted(path.parent for path in study_folder.glob(f"*/seed*/{CONFIG_NAME}"))
    return [
        f"{folder.parent.name} seed {folder.name.removeprefix('seed')}"
        for folder in begun
        if not (folder / RESULT_NAME).exists()
    ]


def sample_generations(arms: Arms) -> Iterator[Block]:
    """Continuations by the first run of each variant that has some; nothing for records without."""
    samples = {label: next((run.samples for run in runs if run.samples), ()) for label, runs in arms.items()}
    prompts = dict.fromkeys((sample.prompt, sample.held_out) for found in samples.values() for sample in found)
    if not prompts:
        return
    yield Heading("Samples")
    yield Paragraph(
        "Held-out passages, and how the first seed of each variant continues them when it always takes the likeliest "
        "token. Samples show what these losses look like; they do not rank the variants."
    )
    for number, (prompt, held_out) in enumerate(prompts, start=1):
        texts = {"Prompt": prompt, "Held-out text": held_out}
        for label, found in samples.items():
            texts |= {f"`{label}`": one.continuation for one in found if one.prompt == prompt}
        blocks: list[Block] = []
        for name, text in texts.items():
            shown = text if text.strip() else f"({len(text)} blank characters)"
            blocks += [Paragraph(name, "name"), CodeBlock(shown, "text")]
        yield Details(f"Passage {number} of {len(prompts)}", blocks, is_open=number == 1)
