"""An analysis as a document: what was read, results, figures, tokens, definitions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gated_attention.analysis.definitions import ALL, GATE_MEASURES
from gated_attention.analysis.reduction import SINK_THRESHOLD, MassiveActivation, mean_of_numbers
from gated_attention.jobs.analyze import Analysis, AnalysisPlan, TokenGate
from gated_attention.ranges import consecutive_runs
from gated_attention.report.analysis.ablation import ablation_blocks
from gated_attention.report.analysis.figures import FOLDER, analysis_figures
from gated_attention.report.analysis.record import as_json, csv_text
from gated_attention.report.analysis.sink_kinds import sink_kind_words
from gated_attention.report.analysis.tables import detail_tables, largest, summary_table
from gated_attention.report.analysis.token_view import token_view
from gated_attention.report.blocks import (
    Block,
    Bullets,
    CodeBlock,
    Details,
    Heading,
    Links,
    Paragraph,
    TableBlock,
    with_contents,
    write_document,
)
from gated_attention.report.command_line import plan_command, source_name
from gated_attention.report.plots import strokes_for
from gated_attention.report.study.columns import SINK_FACTOR
from gated_attention.report.tables import Column, number_text, significant, table_of
from gated_attention.spec import SITE_LABELS

LISTED_TOKENS = 12
"""Tokens listed with the lowest and with the highest gate scores."""

LISTED_MASSIVE = 12
"""Places of massive activations listed per model."""

_THREE = significant(3)


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


def analysis_blocks(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> list[Block]:
    """The whole document."""
    return with_contents(_document(plan, analyses))


def _document(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> Iterator[Block]:
    colors = {label: stroke.color for label, stroke in strokes_for(a.label for a in analyses).items()}
    names = [analysis.label for analysis in analyses]
    yield Heading(f"Inside {', '.join(names) if len(names) < 3 else f'{len(names)} models'}", level=1)
    yield _lead(plan, analyses)
    yield Heading("Results")
    yield TableBlock(summary_table(analyses), colors)
    yield Bullets([_findings(analysis) for analysis in analyses])
    yield from _table_notes(analyses)
    yield Details("More measures", [TableBlock(table, colors) for table in detail_tables(analyses)])
    yield Heading("Figures")
    yield from analysis_figures(analyses)
    yield from _token_views([analysis for analysis in analyses if analysis.inspection.gates and analysis.excerpt])
    yield from _massive(analyses)
    yield from ablation_blocks(analyses)
    yield Heading("Definitions")
    yield Details("All measures", [Bullets(list(_definitions(analyses)))])
    yield Heading("Reproduce")
    yield CodeBlock(plan_command("analyze", plan.models, plan))
    yield Links("Files", {name: name for name in ("analysis.json", "measures.csv")})


def _lead(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> Paragraph:
    models = "One model" if len(analyses) == 1 else f"{len(analyses)} models, side by side,"
    text = (
        "the source text of Python's standard library" if plan.source == "stdlib" else f"`{source_name(plan.source)}`"
    )
    found = [analysis.inspection for analysis in analyses]
    tokens = _from_to([one.num_tokens for one in found])
    parts, lengths = _content(analyses), _from_to([one.length for one in found])
    is_text = any(one.content == "token" for one in found)
    middle = " Half of the passages start at a document's first token, half in its middle." if is_text else ""
    ahead = " Attention looks ahead: every token sees all others, and uniform attention is one over their number."
    return Paragraph(
        f"{models} reading {text}: {tokens} {parts}{' each' * (len(analyses) > 1)} in "
        f"{'passages' if is_text else 'sequences'} of {lengths}.{middle}"
        f"{ahead.replace('token', found[0].content) if any(one.looks_ahead for one in found) else ''}",
        "lead",
    )


def _content(analyses: Sequence[Analysis]) -> str:
    """What the models read, e.g. `tokens` or `tokens and patches`."""
    return " and ".join(dict.fromkeys(f"{_plural(analysis.inspection.content)}" for analysis in analyses))


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("ch") else f"{word}s"


def _from_to(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _findings(analysis: Analysis) -> str:
    return " ".join([f"**{analysis.label}**", *_sink_words(analysis), _massive_words(analysis), *_gate_words(analysis)])


def _sink_words(analysis: Analysis) -> Iterator[str]:
    found = analysis.inspection
    share, uniform = found.overall("f_attn"), found.overall("f_attn_uniform")
    heads = found.measures["f_attn"]
    layer, head = largest(heads)
    first = found.position_name(0) if found.positions[0] != "content" else f"first {found.content}"
    yield f"gives {share:.4f} of its attention to the {first}, {share / uniform:.1f} times the uniform share:"
    number = int((heads > SINK_THRESHOLD).sum())
    if share >= SINK_FACTOR * uniform:
        yield f"a sink, strongest in layer {layer}, head {head} ({heads[layer, head]:.2f})."
    elif number:
        yield (
            f"no sink on the whole, but {number} of its heads {'has' if number == 1 else 'have'} one, the strongest in "
            f"layer {layer}, head {head} ({heads[layer, head]:.2f})."
        )
    else:
        yield f"no sink; its most attentive head, {head} in layer {layer}, gives {heads[layer, head]:.2f}."
    elsewhere = np.where(found.measures["sink_position"] > 0, found.measures["sink_share"], np.nan)
    if (elsewhere > SINK_THRESHOLD).any():
        layer, head = largest(elsewhere)
        position = int(found.measures["sink_position"][layer, head])
        named = f" ({found.position_name(position)})" if found.looks_ahead else ""
        most = "most often " if found.looks_ahead else ""
        yield (
            f"Layer {layer}, head {head} has a sink elsewhere: {elsewhere[layer, head]:.2f}, {most}at position "
            f"{position}{named}."
        )
    if words := sink_kind_words(found):
        yield words


def _massive_words(analysis: Analysis) -> str:
    found = analysis.inspection
    largest = (
        f"The largest activation of any layer is {np.nanmax(found.measures['m_act']):,.4g}, and M-Act, the mean of the "
        f"layers' largest, {found.overall('m_act'):,.4g}"
    )
    if not found.massive:
        return f"{largest}; none is massive."
    first, layers = found.massive[0], sorted({one.layer for one in found.massive})
    return (
        f"{largest}; massive ones are in layer{'s' * (len(layers) > 1)} {consecutive_runs(layers, ' to ')}, "
        f"most often at position {first.position}, channel {first.channel} (in {100 * first.share:.0f} % of sequences)."
    )


def _gate_words(analysis: Analysis) -> Iterator[str]:
    for site, gate in analysis.inspection.gates.items():
        mean, below = (np.nanmean(gate.measures[name]) for name in ("gate_mean", "gate_share_below_0.1"))
        yield f"Its {SITE_LABELS[site]} gates score {mean:.3f} on average, {100 * below:.0f} % of the scores below 0.1."
    for name, reason in analysis.inspection.unmeasured_gates.items():
        yield f"`{name}` is not measured: {reason}."


def _table_notes(analyses: Sequence[Analysis]) -> Iterator[Paragraph]:
    for analysis in analyses:
        attention = analysis.inspection.attention
        if not attention.all():
            layers = np.flatnonzero(~attention).tolist()
            yield Paragraph(
                f"{analysis.label} has no softmax attention in {len(layers)} of its {len(attention)} layers "
                f"({', '.join(map(str, layers))}); measures of attention are those of the others.",
                "note",
            )


def _token_views(gated: Sequence[Analysis]) -> Iterator[Block]:
    if not gated:
        return
    yield Heading("Gates, token by token")
    yield Paragraph(
        "The first tokens of the first passage, shaded by gate score: no shade is closed, full shade is the most open "
        "of any layer. Scores are averaged over heads and channels."
    )
    for analysis in gated:
        for site, gate in analysis.inspection.gates.items():
            scores = mean_of_numbers(gate.excerpt, axis=1)
            if np.isfinite(scores).all(1).any():
                yield token_view(f"{analysis.label} ({SITE_LABELS[site]})", analysis.excerpt, scores)
    yield Heading("Tokens whose gates are most closed and most open", level=3)
    yield Paragraph("Among tokens that make up 1/1000 of the text or more; averaged over layers and heads.", "note")
    found = [(f"{a.label} ({SITE_LABELS[site]})", gates) for a in gated for site, gates in a.token_gates.items()]
    yield TableBlock(
        table_of(
            {
                Column("Model", numeric=False): [label for label, _ in found],
                Column("Most closed", numeric=False): [_listed(gates[:LISTED_TOKENS]) for _, gates in found],
                Column("Most open", numeric=False): [_listed(gates[: -LISTED_TOKENS - 1 : -1]) for _, gates in found],
            }
        )
    )


def _listed(gates: Sequence[TokenGate]) -> str:
    return ", ".join(f"{_quoted(gate.token)}\u00a0{gate.mean:.2f}" for gate in gates)


def _quoted(token: str) -> str:
    """A token as code, with its blanks and line ends visible."""
    shown = token.replace("`", "'").replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return f"`{shown}`" if shown else "`∅`"


def _massive(analyses: Sequence[Analysis]) -> Iterator[Block]:
    rows = [(analysis.label, *row) for analysis in analyses for row in _massive_places(analysis)[:LISTED_MASSIVE]]
    if not rows:
        return
    labels, layers, places, tokens = zip(*rows, strict=True)
    yield Heading("Massive activations")
    yield TableBlock(
        table_of(
            {
                Column("Model", numeric=False): labels,
                Column("Position"): [str(place.position) for place in places],
                Column("Channel"): [str(place.channel) for place in places],
                Column("Layers"): layers,
                Column("Largest value"): [number_text(place.value, _THREE) for place in places],
                Column("in layer", beneath=True): [str(place.layer) for place in places],
                Column("Over the median"): [number_text(place.over_median, 0) for place in places],
                Column("Token or place then", numeric=False): [_quoted(token) for token in tokens],
                Column("Sequences", "%"): [number_text(100 * place.share, 0) for place in places],
            }
        )
    )
    yield Paragraph(f"At most {LISTED_MASSIVE} places per model; `analysis.json` has more, layer by layer.", "note")


def _massive_places(analysis: Analysis) -> list[tuple[str, MassiveActivation, str]]:
    """For each position and channel: its layers, the largest activation there, and that activation's token."""
    places: dict[tuple[int, int], list[tuple[MassiveActivation, str]]] = {}
    for one, token in zip(analysis.inspection.massive, analysis.massive_tokens, strict=True):
        places.setdefault((one.position, one.channel), []).append((one, token))
    return [
        (consecutive_runs(sorted(one.layer for one, _ in found), " to "), *max(found, key=lambda pair: pair[0].value))
        for found in places.values()
    ]


def _definitions(analyses: Sequence[Analysis]) -> Iterator[str]:
    found = {name for analysis in analyses for name in analysis.inspection.measures}
    if any(analysis.inspection.gates for analysis in analyses):
        found |= GATE_MEASURES.keys()
    for name, definition in ALL.items():
        if name in found:
            source = f" ({definition.source})" if definition.source else ""
            yield f"**{definition.title}** (`{name}`): {definition.text}{source}."
