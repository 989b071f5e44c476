"""The registry on a terminal."""

from rich.console import Console

from gated_attention.sizes import ModelSize, count_parameters
from gated_attention.studies import catalogue
from gated_attention.studies.table import rich_table
from gated_attention.studies.variants import VARIANTS, Variant


def print_registry() -> None:
    """Every variant with its cost at the paper's size, and where the paper disagrees with itself."""
    console = Console()
    console.print(rich_table(catalogue.registry_table()))
    for note in dict.fromkeys(note for variant in VARIANTS.values() for note in catalogue.notes(variant)):
        console.print(f"[dim]{note}[/]", highlight=False)


def print_variant(variant: Variant, size: ModelSize) -> None:
    """One variant at a size: in words, as fields, and its parameters beside the baseline's.

    Raises:
        ValueError: if the variant does not fit the size.
    """
    resized, console = variant.resize(size), Console()
    account, baseline = count_parameters(resized, variant.block), count_parameters(size)
    console.print(f"[bold]{variant.name}[/] at size {size.name}: {variant.describe()}", highlight=False)
    if variant.cites:
        console.print(f"rows of the paper: {', '.join(variant.cites)}", highlight=False)
    console.print(
        f"{resized.num_hidden_layers} layers of width {resized.hidden_size}, {resized.num_attention_heads} query and "
        f"{resized.num_key_value_heads} key/value heads of {resized.head_dim}, FFN {resized.intermediate_size}"
        + (f" in each of {resized.num_experts} experts" if resized.num_experts else ""),
        highlight=False,
    )
    console.print(rich_table(catalogue.account_table(variant, size), width=200))
    policy = f"FFN narrowed from {size.intermediate_size}" if variant.matches(size) else "parameters are added"
    console.print(f"{policy}; residue {100 * (account.total / baseline.total - 1):+.3f} %", highlight=False)
    for note in catalogue.notes(variant):
        console.print(f"[dim]{note}[/]", highlight=False)
