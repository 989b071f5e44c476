"""The end of a report: cost, every run, definitions, limits, how to reproduce it."""

from collections.abc import Iterator, Sequence

from gated_attention.report.blocks import Block, Bullets, CodeBlock, Details, Heading, Paragraph, TableBlock
from gated_attention.report.command_line import compare_command, without_option
from gated_attention.report.study.sections import scale_text
from gated_attention.report.study.table import cost_table, spread_text
from gated_attention.report.tables import Column, fixed, significant, table_of
from gated_attention.study.comparison import LOSS, Comparison
from gated_attention.study.record import Result
from gated_attention.study.statistics import CONFIDENCE, spread

DEFINITIONS = {
    LOSS: (
        "Validation loss",
        "mean cross-entropy of the next token on held-out text, natural logarithm. PPL is its exponential, "
        "per token of this study's tokenizer",
    ),
    "f_attn": (
        "F-Attn",
        "attention on the first token of a sequence, averaged over all queries but the first, which sees nothing else, "
        "over heads, then layers (arXiv 2505.06708, Table 4). Uniform is its value under even attention to all visible "
        "tokens: the mean of 1/i over positions i from 2 on",
    ),
    "m_act": (
        "M-Act",
        "largest absolute hidden state of any token at a layer's output, averaged over layers "
        "(arXiv 2505.06708, Table 4)",
    ),
    "gate_score_mean": (
        "Gate mean",
        "gate score after its activation, averaged over tokens, channels, heads and layers, then over sites "
        "(arXiv 2505.06708, Table 4); below 0.1 is the share of scores under that value",
    ),
    "gate_open_share": ("Open gates", "share of hard-sigmoid gate scores above 0, over tokens, heads and layers"),
    "expert_load_max": (
        "Expert load",
        "held-out tokens that a router sends to an expert, over those that each would get if all got the same; "
        "a dead expert gets none",
    ),
    "train_tokens_per_s": (
        "Tokens/s",
        "median training throughput, evaluation and checkpoints left out, on the device named above",
    ),
    "peak_memory_gib": (
        "Memory",
        "peak device memory of a run; on a CPU, peak resident memory of the whole process up to then",
    ),
}
"""Measure to its name in the report and its definition."""


_RUN_COLUMNS = {
    Column("Validation loss", "nats/token"): (LOSS, fixed(4)),
    Column("PPL"): ("val_perplexity", significant(5)),
    Column("F-Attn"): ("f_attn", fixed(4)),
    Column("M-Act"): ("m_act", significant(3)),
    Column("Gate mean"): ("gate_score_mean", fixed(4)),
    Column("Open gates"): ("gate_open_share", fixed(4)),
    Column("Expert load", "highest"): ("expert_load_max", fixed(2)),
    Column("Dead experts"): ("dead_experts", fixed(0)),
    Column("Tokens/s"): ("train_tokens_per_s", fixed(0)),
}


def cost(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """What the runs cost, and what training speeds do not show."""
    table = cost_table(results, comparison)
    if any("train_tokens_per_s" in run.measures for run in results):
        note = (
            "Time is training alone, tokens over the run's median tokens/s: evaluation, checkpoints and compilation "
            "come on top. Other work on a device slows its runs."
        )
        yield Details("Training time and cost", [TableBlock(table), Paragraph(note, "note")])


def every_run(results: Sequence[Result]) -> Iterator[Block]:
    """The raw numbers, a row for each run; nothing where each variant has one, which the comparison shows."""
    if len({run.variant for run in results}) == len(results):
        return
    columns = {
        Column("Variant", numeric=False): [run.variant for run in results],
        Column("Seed"): [str(run.seed) for run in results],
    }
    for column, (name, decimals) in _RUN_COLUMNS.items():
        values = [[run.measures[name].value] if name in run.measures else [] for run in results]
        columns[column] = [spread_text(spread(value) if value else None, decimals) for value in values]
    yield Heading("Every run")
    yield Details(f"{len(results)} runs", [TableBlock(table_of(columns))])


def definitions(comparison: Comparison) -> Iterator[Block]:
    """What each printed number is, and where its definition comes from."""
    present = {name for row in comparison.rows for name in row.measures}
    items = [f"**{name}**: {text}." for measure, (name, text) in DEFINITIONS.items() if measure in present]
    if comparison.reference:
        items.append(
            "**Difference**: mean over seeds of the validation loss minus the reference's with the same seed; its "
            "standard error is the standard deviation of those differences over the root of their number; "
            "t is their ratio (paired t test)."
        )
    items.append("**Residue**: share of the reference's parameters by which a variant's exceed them.")
    yield Heading("Definitions")
    yield Details("All measures", [Bullets(items)])


def limits(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """What a reader must not conclude from the study."""
    seeds = [len(row.seeds) for row in comparison.rows]
    compared = len([row for row in comparison.rows if row.difference and row.difference.n > 1])
    rates = {run.config.get("train", {}).get("learning_rate") for run in results}
    one_rate = "One learning rate and one schedule for all variants"
    own_rate = "One learning rate for each variant, a given multiple of the study's, and one schedule"
    other_text = any(run.config.get("data", {}).get("validation") for run in results)
    held_out = "" if other_text else " of the same source as the training text"
    items = ["One seed: differences have no spread, and none of them is evidence."]
    if max(seeds) > 1:
        number = str(min(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        items = [f"{number} seeds per variant: the spread itself is an estimate, and small effects stay hidden."]
    if compared > 1:
        items.append(
            f"{compared} comparisons are tested at {100 * CONFIDENCE:.0f} % each, without correction: "
            f"{(1 - CONFIDENCE) * compared:.2f} false findings are expected if no gate has an effect."
        )
    items += [
        f"Scale: {scale_text(results, comparison)}. "
        "Others found that a gate's effect changes with scale, and below 2M parameters even its sign.",
        f"{one_rate if len(rates) == 1 else own_rate}; none was tuned for its own best.",
        f"Loss on held-out text{held_out}; no benchmark, no long context.",
    ]
    yield Heading("Limitations")
    yield Bullets(items)


def reproduction(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """The command, the commit and the versions behind the runs."""
    commits = dict.fromkeys(run.git_commit or "not from a checkout" for run in results)
    devices = dict.fromkeys(run.device for run in results)
    versions = dict.fromkeys(f"{name} {version}" for run in results for name, version in run.versions.items())
    yield Heading("Reproduce")
    yield CodeBlock(compare_command(results, comparison))
    yield Bullets(
        [
            f"Commit: {', '.join(f'`{commit}`' for commit in commits)}",
            f"Device: {', '.join(devices)}",
            f"Versions: {', '.join(versions)}",
            *without_option(results),
            "Every setting of a run is in its `config.json`, every number in its `result.json`. "
            "This report follows from these files alone.",
        ]
    )
