"""Writes an analysis: page, data, table and figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.files import write_all, writing_to
from gated_attention.jobs.analyze import Analysis, AnalysisPlan
from gated_attention.report.analysis.figures import FOLDER
from gated_attention.report.analysis.page import analysis_blocks, title
from gated_attention.report.analysis.record import as_json, csv_text
from gated_attention.report.blocks import FigureBlock, html, markdown


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
    with writing_to(folder):
        return write_all(folder, files, stale=[f"{FOLDER}/{path.name}" for path in (folder / FOLDER).glob("*.svg")])
