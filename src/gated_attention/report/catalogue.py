"""The registry as a reader sees it: what every variant is, costs and cites. Imports neither torch nor transformers."""

from dataclasses import asdict
from typing import Any

from gated_attention.registry.published import ROWS
from gated_attention.registry.variants import VARIANTS, Variant
from gated_attention.report.tables import Cell, Column, Table, number_text, significant, table_of
from gated_attention.sizes import ModelSize, count_parameters, get_size

PAPER_SIZE = "15a2b"
"""The size at which the paper prints added parameters (Tables 1 and 6)."""

TOLERANCE_M = 1.0
"""Millions of parameters within which a printed number counts as ours."""


def added_parameters(variant: Variant, size: ModelSize) -> int:
    """Parameters that a variant adds to a size, before any FFN is narrowed."""
    wider = size if variant.matches(size) else variant.resize(size)
    return count_parameters(wider, variant.block).total - count_parameters(size).total


def printed_parameters_m(variant: Variant) -> float | None:
    """What the paper prints as added parameters, in millions, in the first of the variant's rows that has it."""
    printed = (ROWS[key].added_parameters_m for key in variant.cites if key in ROWS)
    return next((value for value in printed if value is not None), None)


def notes(variant: Variant) -> list[str]:
    """The paper's inconsistencies about a variant's rows, as `T1.4: ...`."""
    return [f"{key}: {ROWS[key].note}" for key in variant.cites if key in ROWS and ROWS[key].note]


def describe(variant: Variant) -> dict[str, Any]:
    """One row of the registry for JSON: the data of the variant, its words, and its cost at the paper's size."""
    return {
        "name": variant.name,
        "description": variant.describe(),
        "cites": list(variant.cites),
        "block": {**asdict(variant.block), "gates": [gate.to_dict() for gate in variant.block.gates]},
        "widen": {name: str(factor) for name, factor in variant.widen},
        "learning_rate_factor": str(variant.learning_rate),
        "match_parameters": variant.match_parameters,
        "gate_penalty": asdict(variant.gate_penalty) if variant.gate_penalty else None,
        "added_parameters": added_parameters(variant, get_size(PAPER_SIZE)),
        "added_parameters_printed_m": printed_parameters_m(variant),
        "notes": notes(variant),
    }


def resolve(variant: Variant, size: ModelSize) -> dict[str, Any]:
    """A variant at a size: the size as it is trained, its parameters, and how far they are from the baseline's.

    Raises:
        ValueError: if the variant does not fit the size.
    """
    resized = variant.resize(size)
    account, baseline = count_parameters(resized, variant.block), count_parameters(size)
    return {
        **describe(variant),
        "size": asdict(resized),
        "parameters": account.to_dict(),
        "matched": variant.matches(size),
        "residue": account.total / baseline.total - 1.0,
    }


def registry() -> list[dict[str, Any]]:
    """`describe` of every variant, in the order of the registry."""
    return [describe(variant) for variant in VARIANTS.values()]


def registry_table() -> Table:
    """The registry for a terminal: costs at the paper's size beside what the paper prints."""
    size, rows = get_size(PAPER_SIZE), list(VARIANTS.values())
    return table_of(
        {
            Column("Variant", numeric=False): [row.name for row in rows],
            Column("Rows of the paper", beneath=True, numeric=False): [" ".join(row.cites) for row in rows],
            Column("What it is", numeric=False): [row.describe() for row in rows],
            Column("Added", "M"): [millions(added_parameters(row, size)) for row in rows],
            Column("printed", beneath=True): [_printed(row, size) for row in rows],
        }
    )


def account_table(variant: Variant, size: ModelSize) -> Table:
    """What a variant's parameters are spent on at a size, beside the baseline's."""
    ours = count_parameters(variant.resize(size), variant.block).to_dict()
    theirs = count_parameters(size).to_dict()
    return table_of(
        {
            Column("Parameters", numeric=False): list(ours),
            Column(variant.name): [f"{count:,}" for count in ours.values()],
            Column("baseline"): [f"{theirs[name]:,}" for name in ours],
        }
    )


def millions(parameters: int) -> str:
    """A number of parameters in millions: 201, 25.2, 1.57, 0.20, 0.0008, 0."""
    value = parameters / 1e6
    if 0 < value < 0.1:
        return number_text(value, significant(1))
    return number_text(value, 0 if value == 0 or value >= 100 else 1 if value >= 10 else 2)


def _printed(variant: Variant, size: ModelSize) -> Cell | None:
    printed = printed_parameters_m(variant)
    if printed is None:
        return None
    differs = abs(printed - added_parameters(variant, size) / 1e6) > TOLERANCE_M
    return Cell(f"{printed:g}{' *' if differs else ''}", "bad" if differs else "")
