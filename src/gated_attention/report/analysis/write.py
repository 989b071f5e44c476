"""Writes an analysis: page, data, table and figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from gated_attention.jobs.analyze import Analysis, AnalysisPlan
from gated_attention.report.analysis.figures import FOLDER
from gated_attention.report.analysis.page import analysis_blocks
from gated_attention.report.analysis.record import as_json, csv_text
from gated_attention.report.blocks import write_document


def write_analysis(plan: AnalysisPlan, analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """Write `analysis.md`, `analysis.html`, `analysis.json`, `measures.csv` and `figures/*.svg`.

    Figures of an earlier analysis in the same folder are removed.

    Raises:
        ValueError: if nothing can be written there.
    """
    files = {
        "analysis.json": json.dumps(as_json(plan, analyses), ensure_ascii=False, allow_nan=False) + "\n",
        "measures.csv": csv_text(analyses),
    }
    earlier = [f"{FOLDER}/{path.name}" for path in (folder / FOLDER).glob("*.svg")]
    return write_document(folder, "analysis", analysis_blocks(plan, analyses), files, earlier)
