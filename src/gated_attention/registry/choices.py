"""Checks of names that the command line makes before it loads PyTorch."""

from collections.abc import Collection, Sequence

from gated_attention.ranges import require_choice, require_once
from gated_attention.registry.architectures import OWN, Architecture, get_architecture
from gated_attention.registry.variants import BASELINE, VARIANTS, Variant, get_variant, variants_of
from gated_attention.registry.vision import VISION_DEFAULT, VISION_SIZES, VISION_VARIANTS, VIT
from gated_attention.sizes import ModelSize, get_size

TASKS = (
    *("perplexity", "length", "retrieval", "quantization"),
    *("hellaswag", "mmlu", "gsm8k", "humaneval", "ceval", "cmmlu", "ruler"),
)
"""The tasks of `evaluate`."""

ARMS = ("gated", "control", "penalties")
"""What `adapt` trains: gates with penalties; plain continued training; penalties without gates."""


TEXT, VISION = STUDY_TASKS = ("text", "vision")
"""What a study trains: language models on text, or classifiers on images."""

DEFAULT_SIZES = {TEXT: "tiny", VISION: "vit-tiny"}
"""The size of a study that names none, by task."""

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


def choose_shape(size: str, architecture: str, task: str) -> tuple[Architecture, ModelSize]:
    """The architecture of a study, and its size as that architecture fits it.

    Raises:
        ValueError: if one is unknown, or the task or the architecture cannot have another.
    """
    require_choice("task", task, STUDY_TASKS)
    if task == VISION:
        if architecture != OWN:
            raise ValueError(f"architecture {architecture!r} is of text; task {VISION!r} trains {VIT.title}s")
        require_choice("size", size, VISION_SIZES)
        return VIT, VISION_SIZES[size]
    family = get_architecture(architecture)
    return family, family.fit(get_size(size))


def choose_variants(
    names: Sequence[str] | None, table: int | None, size: str, architecture: str = OWN, task: str = TEXT
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """The variants to train, and why rows of a table are left out.

    Args:
        names: None is the task's default, or with a table its rows.

    Raises:
        ValueError: if names and a table are both given, one is unknown, or the size or the architecture cannot have a
            named variant.
    """
    family, shape = choose_shape(size, architecture, task)
    if task == VISION and table is not None:
        raise ValueError(f"table {table} of the paper is of text; task {VISION!r} has variants only")
    known, default = (VARIANTS, DEFAULT) if task == TEXT else ({**VARIANTS, **VISION_VARIANTS}, VISION_DEFAULT)

    def check(variant: Variant) -> None:
        family.check(variant)
        variant.resize(shape)

    if table is None:
        for name in (names := default if names is None else names):
            require_choice("variant", name, known)
        chosen = [known[name] for name in names]
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
