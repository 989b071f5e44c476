"""The registry on a terminal."""

from rich.console import Console

from gated_attention.registry.settings import SETTINGS
from gated_attention.registry.variants import VARIANTS, Variant
from gated_attention.report import catalogue
from gated_attention.report.tables import rich_table
from gated_attention.sizes import ModelSize, count_parameters

LEGEND = f"""\
T1.5 is Table 1, row 5 of arXiv 2505.06708, A.6 a part of its appendix. G1 to G5 are the paper's five sites.
Added: parameters in millions at size {catalogue.PAPER_SIZE}, above what the paper prints;
* where these are more than {catalogue.TOLERANCE_M:g}M apart. Dense sizes narrow the FFN instead of adding.
`variants NAME --size SIZE` looks at one, `compare --variants NAME,NAME` trains some, `compare --table N` a table.
"""


def print_registry() -> None:
    """Every variant with its cost at the paper's size, and where the paper disagrees with itself."""
    console = Console()
    console.print(rich_table(catalogue.registry_table()))
    console.print(LEGEND, highlight=False)
    for note in dict.fromkeys(note for variant in VARIANTS.values() for note in catalogue.notes(variant)):
        console.print(f"[dim]{note}[/]", highlight=False)


def print_variant(variant: Variant, size: ModelSize) -> None:
    """One variant at a size: in words, as fields, and its parameters beside the baseline's.

    Raises:
        ValueError: if the variant does not fit the size.
    """
    resized, console = variant.resize(size), Console()
    account, baseline = count_parameters(resized, variant.block), count_parameters(size)
    lines = [f"[bold]{variant.name}[/] at size {size.name}: {variant.describe()}"]
    if variant.cites:
        lines.append(f"rows of the paper: {', '.join(variant.cites)}")
    experts = f" in each of {resized.num_experts} experts" if resized.num_experts else ""
    passes = f", of which a token passes {resized.num_experts_per_tok}" if resized.num_experts else ""
    lines.append(
        f"{resized.num_hidden_layers} layers of width {resized.hidden_size}, {resized.num_attention_heads} query and "
        f"{resized.num_key_value_heads} key/value heads of {resized.head_dim}, "
        f"FFN {resized.intermediate_size}{experts}{passes}"
    )
    tied = "tied" if resized.tie_word_embeddings else "untied"
    lines.append(f"vocabulary {resized.vocab_size:,}, {tied} embeddings, context {resized.context}")
    rate = SETTINGS[size.name].learning_rate
    lines.append(f"peak learning rate {rate * float(variant.learning_rate):g}")
    for gate in variant.block.gates:
        heads, channels = gate.score_shape(resized.geometry)
        cost = gate.num_parameters(resized.geometry)
        lines.append(f"{gate.label}: {heads} x {channels} scores a token, {cost:,} parameters a layer")
    for line in lines:
        console.print(line, highlight=False)
    console.print(rich_table(catalogue.account_table(variant, size), width=200))
    console.print(
        f"{_policy(variant, size, resized)}; residue {100 * (account.total / baseline.total - 1):+.3f} %",
        highlight=False,
    )
    for note in catalogue.notes(variant):
        console.print(f"[dim]{note}[/]", highlight=False)


def _policy(variant: Variant, size: ModelSize, resized: ModelSize) -> str:
    """How the variant's parameters are set against the baseline's."""
    if not variant.matches(size):
        return "parameters are added"
    if resized.intermediate_size == size.intermediate_size:
        return f"FFN as the baseline's, in multiples of {size.ffn_multiple}"
    return f"FFN narrowed from {size.intermediate_size}, to a multiple of {size.ffn_multiple}"
