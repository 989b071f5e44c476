"""Checks of names that the command line makes before it loads PyTorch."""

from collections.abc import Collection, Sequence

from gated_attention.ranges import require_choice, require_once
from gated_attention.registry.architectures import OWN, get_architecture
from gated_attention.registry.variants import BASELINE, Variant, get_variant, variants_of
from gated_attention.sizes import ModelSize

TASKS = (
    *("perplexity", "length", "retrieval", "quantization"),
    *("hellaswag", "mmlu", "gsm8k", "humaneval", "ceval", "cmmlu", "ruler"),
)
"""The tasks of `evaluate`."""

ARMS = ("gated", "control", "penalties")
"""What `adapt` trains: gates with penalties; plain continued training; penalties without gates."""


DEFAULT = (BASELINE, "sdpa-headwise", "sdpa-elementwise")
"""The variants of a study that names none."""


def split_names(text: str, what: str, choices: Collection[str] | None = None) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: if there is none, one is repeated, or one is not among the choices.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"no {what} is named in {text!r}; name at least one")
    require_once(what, names)
    for name in names if choices is not None else ():
        require_choice(what, name, choices or ())
    return names


def choose_variants(
    names: Sequence[str] | None, table: int | None, size: ModelSize, architecture: str = OWN
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """The variants to train, and why rows of a table are left out.

    Args:
        names: None is `DEFAULT`, or with a table its rows.
        size: As the registry has it, not yet fitted to the architecture.

    Raises:
        ValueError: if names and a table are both given, one is unknown, or the size or the architecture cannot have a
            named variant.
    """
    family = get_architecture(architecture)
    size = family.fit(size)

    def check(variant: Variant) -> None:
        family.check(variant)
        variant.resize(size)

    if table is None:
        chosen = [get_variant(name) for name in (DEFAULT if names is None else names)]
        for variant in chosen:
            check(variant)
        return tuple(chosen), ()
    if names is not None:
        raise ValueError(f"table {table} and variants {', '.join(names)} were both asked for; choose one of them")
    chosen, left_out = [], []
    for variant in variants_of(table):
        try:
            check(variant)
        except ValueError as error:
            left_out.append(str(error))
        else:
            chosen.append(variant)
    if all(variant.name != BASELINE for variant in chosen):
        chosen.insert(0, get_variant(BASELINE))  # Table 6 is compared with Table 1's
    return tuple(chosen), tuple(left_out)
