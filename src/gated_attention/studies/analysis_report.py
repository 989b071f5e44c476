"""Writes an analysis: page, data, table and figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.studies.analysis_figures import FOLDER
from gated_attention.studies.analysis_page import analysis_blocks, title
from gated_attention.studies.analysis_record import as_json, csv_text
from gated_attention.studies.analyze import Analysis, AnalysisPlan
from gated_attention.studies.page import FigureBlock, html, markdown


def prepare_folder(folder: Path) -> None:
    """Make the folder, before anything is measured for it.

    Raises:
        ValueError: if it cannot be made.
    """
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output") from error


def write_analysis(plan: AnalysisPlan, analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """Write `analysis.html`, `analysis.md`, `analysis.json`, `measures.csv` and `figures/*.svg`.

    Figures of an earlier analysis in the same folder are removed.

    Returns:
        What was written, the page first.

    Raises:
        ValueError: if nothing can be written there.
    """
    blocks = analysis_blocks(plan, analyses)
    files = {
        "analysis.html": html(title(analyses), blocks),
        "analysis.md": markdown(blocks),
        "analysis.json": json.dumps(as_json(plan, analyses), ensure_ascii=False, allow_nan=False) + "\n",
        "measures.csv": csv_text(analyses),
        **{block.path: block.svg for block in blocks if isinstance(block, FigureBlock)},
    }
    prepare_folder(folder)
    try:
        for stale in (folder / FOLDER).glob("*.svg"):
            stale.unlink()
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); choose another --output") from error
    return [folder / name for name in files]
