"""The second half of a report: beside the paper, every run, definitions, limits, how to run it again."""

import shlex
from collections.abc import Sequence
from math import log

from gated_attention.studies.comparison import LOSS, Comparison, VariantRow
from gated_attention.studies.ordering import orders
from gated_attention.studies.page import Block, Bullets, CodeBlock, Heading, Paragraph, TableBlock
from gated_attention.studies.published import ROWS, PublishedRow, cite
from gated_attention.studies.record import Result
from gated_attention.studies.sections import count_text, source_name
from gated_attention.studies.statistics import CONFIDENCE, spread
from gated_attention.studies.table import (
    ABSENT,
    Cell,
    Column,
    difference_text,
    fixed,
    significant,
    spread_text,
    table_of,
)

DEFINITIONS = {
    LOSS: (
        "Validation loss",
        "mean cross-entropy of the next token on held-out text, natural logarithm. PPL is its exponential, "
        "per token of this study's tokenizer",
    ),
    "f_attn": (
        "F-Attn",
        "attention on the first token of a sequence, averaged over queries but the first, which sees nothing else, "
        "over heads, then layers (arXiv 2505.06708, Table 4). Uniform is its value if every query spread its attention "
        "evenly over the tokens it sees: the mean of 1/i over positions i from 2 on",
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
    "gate_open_share": (
        "Open gates",
        "share of hard-sigmoid gate scores above 0, over tokens, heads and layers",
    ),
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

# Option of `compare` to where a run's configuration keeps it.
_OPTIONS = {
    "size": ("size", "name"),
    "data": ("data", "source"),
    "validation": ("data", "validation"),
    "text-field": ("data", "text_field"),
    "tokenizer": ("data", "tokenizer"),
    "context": ("data", "block_size"),
    "bos": ("data", "bos"),
    "steps": ("train", "steps"),
    "batch-size": ("train", "batch_size"),
    "accumulation": ("train", "accumulation"),
    "learning-rate": ("train", "learning_rate"),
    "weight-decay": ("train", "weight_decay"),
    "compile": ("train", "compile"),
}


def beside_paper(results: Sequence[Result], comparison: Comparison) -> list[Block]:
    """The paper's own numbers for the variants that it has, its baseline beside them; empty where it has none."""
    entries = [(row, group) for row in comparison.rows for group in _published(row)]
    if not entries:
        return []
    rows, groups = zip(*entries, strict=True)
    baselines = [tuple(cite(row.baseline) for row in group if row.baseline) for group in groups]
    table = table_of(
        {
            Column("Variant", numeric=False): [Cell(row.variant) for row in rows],
            Column("Row of the paper", beneath=True, numeric=False): [Cell(_names(group)) for group in groups],
            Column("PPL"): [_first(group, "perplexity", 3) for group in groups],
            Column("baseline's PPL", beneath=True): [_first(group, "perplexity", 3) for group in baselines],
            Column("ln PPL ratio", "nats"): [_log_ratio(*pair) for pair in zip(groups, baselines, strict=True)],
            Column("here", "nats", beneath=True): [_difference(row) for row in rows],
            Column("F-Attn"): [_first(group, "f_attn", 3) for group in groups],
            Column("baseline's F-Attn", beneath=True): [_first(group, "f_attn", 3) for group in baselines],
            Column("M-Act"): [_first(group, "m_act", 0) for group in groups],
            Column("baseline's M-Act", beneath=True): [_first(group, "m_act", 0) for group in baselines],
            Column("Gate mean"): [_first(group, "gate_score", 3) for group in groups],
            Column("here", beneath=True): [_gate_mean(row) for row in rows],
        }
    )
    settings = " and ".join(dict.fromkeys(row.setting for group in groups for row in group))
    tokens = max(result.tokens_seen for result in results)
    scale = (
        f"The paper's numbers are of {settings}; this study's models have {_parameters_text(comparison)}and saw "
        f"{count_text(tokens)} tokens. The scales differ by orders of magnitude: compare signs and ratios, not values."
    )
    notes = [
        "T1.5 is Table 1, row 5 of Qiu et al., arXiv 2505.06708; the paper has one run of each.",
        *(f"{row.cite}: {row.note}." for group in groups for row in group if row.note),
    ]
    return [
        Heading("Beside the paper"),
        Paragraph(scale),
        TableBlock(table),
        Paragraph(" ".join(notes), "note"),
        *_order_of_rows(comparison),
    ]


def _order_of_rows(comparison: Comparison) -> list[Block]:
    """Rank correlations with the paper's tables and the agreement of signs; empty where no table has two rows here."""
    found = orders(comparison)
    if not found:
        return []
    known = [order.correlation is not None for order in found]
    table = table_of(
        {
            Column("Table", numeric=False): [Cell(f"Table {order.table}, {order.title}") for order in found],
            Column("Rows"): [Cell(str(len(order.pairs))) for order in found],
            Column("Rank correlation"): [
                Cell(f"{order.correlation:+.2f}" if ok else ABSENT) for order, ok in zip(found, known, strict=True)
            ],
            Column("p", beneath=True): [
                Cell(f"{order.p_value:.2g}" if ok else ABSENT) for order, ok in zip(found, known, strict=True)
            ],
            Column("Same sign as in the paper"): [
                Cell(f"{order.num_agree} of {order.num_signs}" if order.num_signs else ABSENT) for order in found
            ],
        }
    )
    text = (
        "Do the rows come out in the paper's order? Spearman's rank correlation over the rows that both have, with the "
        "two-sided share of all orders that lie as far from 0; and the sign of each row's difference to its baseline. "
        "A correlation over few rows or within noise says little."
    )
    return [Heading("The order of the rows", level=3), Paragraph(text), TableBlock(table)]


def _published(row: VariantRow) -> list[tuple[PublishedRow, ...]]:
    """The variant's rows in the paper, those that print one model in several tables together; no baselines."""
    groups: dict[tuple[str, float | None], list[PublishedRow]] = {}
    for key in row.cites:
        if key in ROWS and (found := cite(key)).baseline:
            groups.setdefault((found.setting, found.perplexity), []).append(found)
    return [tuple(group) for group in groups.values()]


def _names(group: Sequence[PublishedRow]) -> str:
    first = group[0]
    method = f"{first.method}, {first.activation}" if first.activation else first.method
    return f"{', '.join(row.cite for row in group)}: {method}"


def _first(group: Sequence[PublishedRow], column: str, decimals: int) -> Cell:
    """The column's number from the first of the rows that has it."""
    value = _number(group, column)
    return Cell(ABSENT if value is None else f"{value:,.{decimals}f}")


def _number(group: Sequence[PublishedRow], column: str) -> float | None:
    return next((value for row in group if (value := getattr(row, column)) is not None), None)


def _log_ratio(group: Sequence[PublishedRow], baselines: Sequence[PublishedRow]) -> Cell:
    ours, theirs = _number(group, "perplexity"), _number(baselines, "perplexity")
    return Cell(f"{log(ours / theirs):+.4f}" if ours and theirs else ABSENT)


def _difference(row: VariantRow) -> Cell:
    return Cell(difference_text(row.difference) if row.difference else ABSENT)


def _gate_mean(row: VariantRow) -> Cell:
    return Cell(spread_text(row.measures.get("gate_score_mean"), fixed(3)))


def _parameters_text(comparison: Comparison) -> str:
    largest = max((row.parameters or 0 for row in comparison.rows), default=0)
    return f"{count_text(largest)} parameters " if largest else ""


def every_run(results: Sequence[Result]) -> list[Block]:
    """The raw numbers, a row for each run; empty where each variant has one, which the comparison shows."""
    if len({run.variant for run in results}) == len(results):
        return []
    measures = {
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
    columns = {
        Column("Variant", numeric=False): [Cell(run.variant) for run in results],
        Column("Seed"): [Cell(str(run.seed)) for run in results],
    }
    for column, (name, decimals) in measures.items():
        values = [[run.measures[name].value] if name in run.measures else [] for run in results]
        columns[column] = [Cell(spread_text(spread(value) if value else None, decimals)) for value in values]
    return [Heading("Every run"), TableBlock(table_of(columns))]


def definitions(comparison: Comparison) -> list[Block]:
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
    return [Heading("How each number is defined"), Bullets(items)]


def limits(results: Sequence[Result], comparison: Comparison) -> list[Block]:
    """What a reader must not take from the study."""
    seeds = [len(row.seeds) for row in comparison.rows]
    compared = len([row for row in comparison.rows if row.difference and row.difference.n > 1])
    other_text = any(run.config.get("data", {}).get("validation") for run in results)
    held_out = "" if other_text else " of the same source as the training text"
    items = []
    if max(seeds) == 1:
        items.append("One seed: differences have no spread, and none of them is evidence.")
    else:
        number = str(min(seeds)) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        items.append(f"{number} seeds a variant: the spread itself is an estimate, and small effects stay hidden.")
    if compared > 1:
        items.append(
            f"{compared} comparisons are tested at {100 * CONFIDENCE:.0f} % each, without correction: "
            f"{(1 - CONFIDENCE) * compared:.2f} false findings are expected if no gate did anything."
        )
    items += [
        f"Scale: {_parameters_text(comparison)}and {count_text(max(run.tokens_seen for run in results))} tokens. "
        "Others found that a gate's effect changes with scale, and below 2M parameters even its sign.",
        "One learning rate and one schedule for all variants; none was tuned for its own best.",
        f"Loss on held-out text{held_out}; no benchmark, no long context.",
    ]
    return [Heading("What this does not show"), Bullets(items)]


def reproduction(results: Sequence[Result], comparison: Comparison) -> list[Block]:
    """The command, the commit and the versions behind the runs."""
    commits = dict.fromkeys(run.git_commit or "not from a checkout" for run in results)
    devices = dict.fromkeys(run.device for run in results)
    versions = dict.fromkeys(f"{name} {version}" for run in results for name, version in run.versions.items())
    items = [
        f"Commit: {', '.join(f'`{commit}`' for commit in commits)}",
        f"Device: {', '.join(devices)}",
        f"Versions: {', '.join(versions)}",
        "Every setting of a run is in its `config.json`, every number in its `result.json`; "
        "the whole of this report follows from those files.",
    ]
    return [Heading("Run it again"), CodeBlock(_command(results, comparison)), Bullets(items)]


def _command(results: Sequence[Result], comparison: Comparison) -> str:
    """The `compare` call that makes these runs, every setting that it can take spelled out."""
    run = results[0]
    options: dict[str, object] = {
        "name": run.study,
        "variants": ",".join(row.variant for row in comparison.rows),
        "seeds": max(len(row.seeds) for row in comparison.rows),
        **{option: run.config.get(part, {}).get(key) for option, (part, key) in _OPTIONS.items()},
    }
    words = ["gated-attention compare"]
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words += ["--no-compile"] if option == "compile" else []  # the other switches are off by default
        elif value is not None:
            words.append(f"--{option} {shlex.quote(source_name(str(value)))}")
    return " \\\n  ".join(words)
