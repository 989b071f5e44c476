"""An analysis as a document: what was read, what was found, figures, tokens, definitions."""

import shlex
from collections.abc import Iterator, Sequence

import numpy as np

from gated_attention.analysis.definitions import GATE_MEASURES, MEASURES
from gated_attention.analysis.reduction import SINK_THRESHOLD, MassiveActivation, mean_of_numbers
from gated_attention.jobs.analyze import Analysis, AnalysisPlan, TokenGate
from gated_attention.report.analysis.figures import analysis_figures
from gated_attention.report.analysis.token_view import token_view
from gated_attention.report.blocks import Block, Bullets, CodeBlock, Heading, Paragraph, TableBlock
from gated_attention.report.plots import strokes_for
from gated_attention.report.study.sections import SINK_FACTOR, count_text, source_name
from gated_attention.report.tables import ABSENT, Cell, Column, Table, fixed, significant, table_of
from gated_attention.spec import SITE_LABELS

LISTED_TOKENS = 12
"""Tokens listed with the lowest and with the highest gate scores."""

LISTED_MASSIVE = 12
"""Places of massive activations listed for each model."""


def analysis_blocks(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> list[Block]:
    """The whole document."""
    colors = {label: stroke.color for label, stroke in strokes_for(a.label for a in analyses).items()}
    return [
        Heading(title(analyses), level=1),
        _lead(plan, analyses),
        Heading("Results"),
        Bullets([line for analysis in analyses for line in _findings(analysis)]),
        TableBlock(attention_table(analyses), colors),
        TableBlock(activation_table(analyses), colors),
        *_table_notes(analyses),
        Heading("Figures"),
        *analysis_figures(analyses),
        *_token_views(analyses),
        *_massive(analyses),
        Heading("Definitions"),
        Bullets(list(_definitions(analyses))),
        Heading("Reproduce"),
        CodeBlock(_command(plan)),
    ]


def title(analyses: Sequence[Analysis]) -> str:
    """The document's title."""
    return f"Inside {', '.join(analysis.label for analysis in analyses)}"


def _lead(plan: AnalysisPlan, analyses: Sequence[Analysis]) -> Paragraph:
    contexts = sorted({analysis.inspection.length for analysis in analyses})
    tokens = sorted({analysis.inspection.num_tokens for analysis in analyses})
    models = "One model" if len(analyses) == 1 else f"{len(analyses)} models, side by side,"
    source = source_name(plan.source)
    text = "the source text of Python's standard library" if plan.source == "stdlib" else f"`{source}`"
    return Paragraph(
        f"{models} reading {text}: {_from_to(tokens)} tokens{' each' * (len(analyses) > 1)} in passages of "
        f"{_from_to(contexts)}, half of them from a document's first token on and half from its middle.",
        "lead",
    )


def _from_to(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _findings(analysis: Analysis) -> Iterator[str]:
    yield f"**{analysis.label}** {_sink_words(analysis)} {_massive_words(analysis)} {_gate_words(analysis)}".strip()


def _sink_words(analysis: Analysis) -> str:
    found = analysis.inspection
    share, uniform = found.overall("f_attn"), found.overall("f_attn_uniform")
    heads = found.measures["f_attn"]
    layer, head = np.unravel_index(np.nanargmax(heads), heads.shape)
    text = f"gives {share:.4f} of its attention to the first token, {share / uniform:.1f} times the uniform share"
    if share >= SINK_FACTOR * uniform:
        text += f": a sink, strongest in layer {layer}, head {head} ({heads[layer, head]:.2f})."
    elif heads[layer, head] > SINK_THRESHOLD:
        number = int((heads > SINK_THRESHOLD).sum())
        text += f": no sink on the whole, but {number} of its heads {'has' if number == 1 else 'have'} one, "
        text += f"the strongest in layer {layer}, head {head} ({heads[layer, head]:.2f})."
    else:
        text += f": no sink; its most attentive head, {head} in layer {layer}, gives {heads[layer, head]:.2f}."
    elsewhere = np.where(found.measures["sink_position"] > 0, found.measures["sink_share"], np.nan)
    if np.isfinite(elsewhere).any():
        layer, head = np.unravel_index(np.nanargmax(elsewhere), elsewhere.shape)
        share, position = elsewhere[layer, head], int(found.measures["sink_position"][layer, head])
        if share > SINK_THRESHOLD:
            text += f" Layer {layer}, head {head} has a sink elsewhere: {share:.2f} at position {position}."
    return text


def _massive_words(analysis: Analysis) -> str:
    found = analysis.inspection
    largest = (
        f"The largest activation of any layer is {np.nanmax(found.measures['m_act']):,.4g}, and M-Act, the mean of the "
        f"layers' largest, {found.overall('m_act'):,.4g}"
    )
    if not found.massive:
        return f"{largest}; none is massive."
    first, layers = found.massive[0], sorted({one.layer for one in found.massive})
    span = f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}"
    return (
        f"{largest}; massive ones are in {span}, most often at position {first.position}, channel {first.channel} "
        f"(in {100 * first.share:.0f} % of passages)."
    )


def _gate_words(analysis: Analysis) -> str:
    words = []
    for site, gate in analysis.inspection.gates.items():
        mean, below = (np.nanmean(gate.measures[name]) for name in ("gate_mean", "gate_share_below_0.1"))
        words.append(
            f"Its {SITE_LABELS[site]} gates score {mean:.3f} on average, {100 * below:.0f} % of the scores below 0.1."
        )
    for name, reason in analysis.inspection.unmeasured_gates.items():
        words.append(f"`{name}` is not measured: {reason}.")
    return " ".join(words)


def attention_table(analyses: Sequence[Analysis]) -> Table:
    """One row for each model: what it is, and its sinks."""
    kinds = [
        f"{analysis.family}, {count_text(analysis.num_parameters)} parameters, "
        f"{len(analysis.inspection.attention)} layers, {analysis.num_heads} heads"
        for analysis in analyses
    ]
    places = [_strongest(analysis) for analysis in analyses]
    return table_of(
        {
            Column("Model", numeric=False): [Cell(analysis.label) for analysis in analyses],
            Column("Kind", beneath=True, numeric=False): [Cell(kind) for kind in kinds],
            Column("F-Attn"): _overall(analyses, "f_attn", 4),
            Column("Uniform", beneath=True): _overall(analyses, "f_attn_uniform", 4),
            Column("At starts"): _overall(analyses, "f_attn_start", 4),
            Column("Mid-document", beneath=True): _overall(analyses, "f_attn_middle", 4),
            Column("From query 4 on"): _overall(analyses, "f_attn_late", 4),
            Column("Uniform then", beneath=True): _overall(analyses, "f_attn_late_uniform", 4),
            Column("Sink^0.3"): _overall(analyses, "sink_rate", 3),
            Column("Value drain", beneath=True): _overall(analyses, "value_drain", 2),
            Column("Strongest key"): [Cell(f"{share:.3f}") for _, share in places],
            Column("its position", beneath=True): [Cell(str(position)) for position, _ in places],
            Column("Entropy", "nats"): _overall(analyses, "entropy", 2),
            Column("uniform", beneath=True): _overall(analyses, "entropy_uniform", 2),
        }
    )


def activation_table(analyses: Sequence[Analysis]) -> Table:
    """One row for each model: its activations and its gates."""

    def gate(name: str) -> list[Cell]:
        values = [[np.nanmean(one.measures[name]) for one in a.inspection.gates.values()] for a in analyses]
        return [Cell(" / ".join(f"{value:.3f}" for value in found) or ABSENT) for found in values]

    sites = [", ".join(SITE_LABELS[site] for site in analysis.inspection.gates) for analysis in analyses]
    massive = [_number(float(a.inspection.measures["massive_tokens"].max()), 2) for a in analyses]
    return table_of(
        {
            Column("Model", numeric=False): [Cell(analysis.label) for analysis in analyses],
            Column("M-Act"): _overall(analyses, "m_act", None),
            Column("Massive tokens", beneath=True): massive,
            Column("Kurtosis"): _overall(analyses, "kurtosis", None),
            Column("Inf norm", beneath=True): _overall(analyses, "inf_norm", None),
            Column("|SDPA output|"): _overall(analyses, "size_before_gate", None),
            Column("after the gate", beneath=True): _overall(analyses, "size_after_gate", None),
            Column("Outputs < 1e-2"): _overall(analyses, "sparsity_1e-2", 3),
            Column("< 1e-3", beneath=True): _overall(analyses, "sparsity_1e-3", 3),
            Column("Gate mean"): gate("gate_mean"),
            Column("below 0.1", beneath=True): gate("gate_share_below_0.1"),
            Column("above 0.9", beneath=True): gate("gate_share_above_0.9"),
            Column("Gate at first"): gate("gate_first"),
            Column("at others", beneath=True): gate("gate_rest"),
            Column("sites", beneath=True): [Cell(site or ABSENT) for site in sites],
            Column("Effective rank"): _overall(analyses, "effective_rank", 1),
            Column("with the gate", beneath=True): _overall(analyses, "effective_rank_gated", 1),
        }
    )


def _overall(analyses: Sequence[Analysis], name: str, decimals: int | None) -> list[Cell]:
    """A measure of every model; None for three significant digits."""
    return [
        _number(a.inspection.overall(name), decimals) if name in a.inspection.measures else Cell(ABSENT)
        for a in analyses
    ]


def _strongest(analysis: Analysis) -> tuple[int, float]:
    """Position and share of the strongest sink of any head."""
    found = analysis.inspection.measures
    place = np.unravel_index(np.nanargmax(found["sink_share"]), found["sink_share"].shape)
    return int(found["sink_position"][place]), float(found["sink_share"][place])


def _number(value: float, decimals: int | None) -> Cell:
    if not np.isfinite(value):
        return Cell(ABSENT)
    places = (significant(3) if decimals is None else fixed(decimals))(value)
    return Cell(f"{value:,.{places}f}")


def _table_notes(analyses: Sequence[Analysis]) -> Iterator[Paragraph]:
    mixed = [analysis for analysis in analyses if not analysis.inspection.attention.all()]
    for analysis in mixed:
        layers = np.flatnonzero(~analysis.inspection.attention).tolist()
        yield Paragraph(
            f"{analysis.label} has no softmax attention in {len(layers)} of its {len(analysis.inspection.attention)} "
            f"layers ({', '.join(map(str, layers))}); measures of attention are those of the others.",
            "note",
        )


def _token_views(analyses: Sequence[Analysis]) -> Iterator[Block]:
    gated = [analysis for analysis in analyses if analysis.inspection.gates]
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
    yield Paragraph(
        "Among tokens that make up a thousandth of the text or more; averaged over layers and heads.", "note"
    )
    yield TableBlock(_token_table(gated))


def _token_table(gated: Sequence[Analysis]) -> Table:
    found = [(a, site, gates) for a in gated for site, gates in a.token_gates.items()]
    return table_of(
        {
            Column("Model", numeric=False): [Cell(f"{a.label} ({SITE_LABELS[site]})") for a, site, _ in found],
            Column("Most closed", numeric=False): [Cell(_listed(gates[:LISTED_TOKENS])) for _, _, gates in found],
            Column("Most open", numeric=False): [Cell(_listed(gates[-LISTED_TOKENS:][::-1])) for _, _, gates in found],
        }
    )


def _listed(gates: Sequence[TokenGate]) -> str:
    return ", ".join(f"{_quoted(gate.token)}\u00a0{gate.mean:.2f}" for gate in gates) or ABSENT


def _quoted(token: str) -> str:
    """A token as code, with its blanks and line ends visible."""
    shown = token.replace("`", "'").replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return f"`{shown}`" if shown else "`∅`"


def _massive(analyses: Sequence[Analysis]) -> Iterator[Block]:
    rows = [(analysis.label, *row) for analysis in analyses for row in _massive_places(analysis)[:LISTED_MASSIVE]]
    if not rows:
        return
    yield Heading("Massive activations")
    yield TableBlock(
        table_of(
            {
                Column("Model", numeric=False): [Cell(label) for label, *_ in rows],
                Column("Position"): [Cell(str(one.position)) for _, _, one, _ in rows],
                Column("Channel"): [Cell(str(one.channel)) for _, _, one, _ in rows],
                Column("Layers"): [Cell(layers) for _, layers, _, _ in rows],
                Column("Largest value"): [_number(one.value, None) for _, _, one, _ in rows],
                Column("in layer", beneath=True): [Cell(str(one.layer)) for _, _, one, _ in rows],
                Column("Over the median"): [_number(one.over_median, 0) for _, _, one, _ in rows],
                Column("Token then", numeric=False): [Cell(_quoted(token)) for _, _, _, token in rows],
                Column("Passages", "%"): [_number(100 * one.share, 0) for _, _, one, _ in rows],
            }
        )
    )
    yield Paragraph(f"At most {LISTED_MASSIVE} places a model; `analysis.json` has more, layer by layer.", "note")


def _massive_places(analysis: Analysis) -> list[tuple[str, MassiveActivation, str]]:
    """Position and channel, in whatever layers: these, the layer of the largest value, and the token that had it."""
    places: dict[tuple[int, int], list[tuple[MassiveActivation, str]]] = {}
    for one, token in zip(analysis.inspection.massive, analysis.massive_tokens, strict=True):
        places.setdefault((one.position, one.channel), []).append((one, token))
    return [
        (_ranges(sorted(one.layer for one, _ in found)), *max(found, key=lambda pair: pair[0].value))
        for found in places.values()
    ]


def _ranges(layers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: `1, 3 to 6`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _definitions(analyses: Sequence[Analysis]) -> Iterator[str]:
    found = {name for analysis in analyses for name in analysis.inspection.measures}
    gated = any(analysis.inspection.gates for analysis in analyses)
    for name, definition in {**MEASURES, **(GATE_MEASURES if gated else {})}.items():
        if name in found or name in GATE_MEASURES:
            source = f" ({definition.source})" if definition.source else ""
            yield f"**{definition.title}** (`{name}`): {definition.text}{source}."


def _command(plan: AnalysisPlan) -> str:
    words = ["gated-attention analyze", *(shlex.quote(source_name(name)) for name in plan.models)]
    words += [f"--data {shlex.quote(source_name(plan.source))}", f"--tokens {plan.num_tokens}"]
    if plan.text_field != "text":
        words.append(f"--text-field {shlex.quote(plan.text_field)}")
    if plan.context is not None:
        words.append(f"--context {plan.context}")
    if plan.tokenizer is not None:
        words.append(f"--tokenizer {shlex.quote(source_name(plan.tokenizer))}")
    if plan.level != "full":
        words.append(f"--level {plan.level}")
    return " \\\n  ".join(words)
