"""The registry on a terminal."""

from collections.abc import Iterable

from rich.console import Console

from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import VARIANTS, Variant
from gated_attention.report import catalogue
from gated_attention.report.tables import rich_table
from gated_attention.sizes import ModelSize

LEGEND = f"""\
T1.5 is Table 1, row 5 of arXiv 2505.06708, A.6 a part of its appendix. G1 to G5 are the paper's five sites.
Added: parameters in millions at size {catalogue.PAPER_SIZE}, above what the paper prints;
* where these are more than {catalogue.TOLERANCE_M:g}M apart. Dense sizes narrow the FFN instead of adding.
`variants NAME --size SIZE` shows one, `compare --variants NAME,NAME` trains some, `compare --table N` a table.
"""


def print_registry() -> None:
    """Print every variant with its cost at the paper's size, and where the paper disagrees with itself."""
    console = Console()
    console.print(rich_table(catalogue.registry_table()))
    console.print(LEGEND, highlight=False)
    _print_notes(console, VARIANTS.values())


def print_variant(variant: Variant, size: ModelSize) -> None:
    """Print one variant at a size: in words, as fields, and its parameters beside the baseline's.

    Raises:
        ValueError: if the variant does not fit the size.
    """
    resized, console = variant.resize(size), Console()
    lines = [f"[bold]{variant.name}[/] at size {size.name}: {variant.describe()}"]
    if variant.cites:
        lines.append(f"rows of the paper: {', '.join(variant.cites)}")
    experts = ""
    if resized.num_experts:
        experts = f" in each of {resized.num_experts} experts, {resized.num_experts_per_tok} per token"
    lines += [
        f"{resized.num_hidden_layers} layers of width {resized.hidden_size}, {resized.num_attention_heads} query and "
        f"{resized.num_key_value_heads} key/value heads of {resized.head_dim}, "
        f"FFN {resized.intermediate_size}{experts}",
        f"vocabulary {resized.vocab_size:,}, {'tied' if resized.tie_word_embeddings else 'untied'} embeddings, "
        f"context {resized.context}",
        f"peak learning rate {SETTINGS[size.name].learning_rate * float(variant.learning_rate):g}",
    ]
    for gate in variant.block.gates:
        heads, channels = gate.score_shape(resized.geometry)
        cost = gate.num_parameters(resized.geometry)
        lines.append(f"{gate.label}: {heads} x {channels} scores per token, {cost:,} parameters per layer")
    for line in lines:
        console.print(line, highlight=False)
    console.print(rich_table(catalogue.account_table(variant, size), width=200))
    if not variant.matches(size):
        policy = "parameters are added"
    elif resized.intermediate_size == size.intermediate_size:
        policy = f"FFN as the baseline's, in multiples of {size.ffn_multiple}"
    else:
        policy = f"FFN narrowed from {size.intermediate_size}, to a multiple of {size.ffn_multiple}"
    residue = catalogue.resolve(variant, size)["residue"]
    console.print(f"{policy}; residue {100 * residue:+.3f} %", highlight=False)
    _print_notes(console, [variant])


def _print_notes(console: Console, variants: Iterable[Variant]) -> None:
    for note in dict.fromkeys(note for variant in variants for note in catalogue.notes(variant)):
        console.print(f"[dim]{note}[/]", highlight=False)
