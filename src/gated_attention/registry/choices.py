"""Checks of names that the command line makes before it loads PyTorch."""

from collections.abc import Sequence

from gated_attention.ranges import require_folder_name, require_once
from gated_attention.registry.variants import get_variant, variants_of
from gated_attention.sizes import get_size

TASKS = (
    *("perplexity", "length", "retrieval", "quantization"),
    *("hellaswag", "mmlu", "gsm8k", "humaneval", "ceval", "cmmlu", "ruler"),
)
"""The tasks of `evaluate`."""


def split_names(text: str, what: str) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: if there is none, or one is repeated.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"no {what} is named in {text!r}; name at least one")
    require_once(what, names)
    return names


def check_one_of(variants: Sequence[str] | None, table: int | None) -> None:
    """Refuse variants together with a table, whose rows are variants.

    Raises:
        ValueError: if both are given.
    """
    if table is not None and variants is not None:
        raise ValueError(f"table {table} and variants {', '.join(variants)} were both asked for; choose one of them")


def check_study(size: str, variants: Sequence[str] | None, table: int | None, name: str | None) -> None:
    """Refuse a study whose name, size, table or variants are wrong.

    Raises:
        ValueError: with what is wrong and the choices.
    """
    if name is not None:
        require_folder_name("study name", name)
    shape = get_size(size)
    check_one_of(variants, table)
    if table is not None:
        variants_of(table)
    for variant in variants or ():
        get_variant(variant).resize(shape)
