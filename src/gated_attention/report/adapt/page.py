"""The page of an adaptation: a pure function of its records."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gated_attention.jobs.adapt_record import (
    METRICS_NAME,
    ORIGINAL,
    Adapted,
    arm_folder,
    read_records,
    read_settings,
    unfinished,
)
from gated_attention.registry.variants import get_variant
from gated_attention.report.adapt.figures import FOLDER, NAMES, Lines, adapt_figures
from gated_attention.report.adapt.findings import ENOUGH_SEEDS, RULE, Findings, compare_arms
from gated_attention.report.adapt.tables import change_table, csv_text, main_table, verdict_table
from gated_attention.report.blocks import (
    Block,
    Bullets,
    CodeBlock,
    Heading,
    Links,
    Paragraph,
    TableBlock,
    explained,
    with_contents,
    write_document,
)
from gated_attention.report.command_line import adapt_command, source_name
from gated_attention.report.plots import strokes_for
from gated_attention.report.tables import count_text, number_text, significant
from gated_attention.study.statistics import Spread
from gated_attention.train.metrics import read_metrics

_ARMS = {
    ORIGINAL: "the model as it came",
    "control": "plain continued training on the same tokens in the same order",
    "penalties": "the same penalties without gates",
    "gated": "gates and penalties",
}


def write_adapt_report(records: Path, folder: Path) -> list[Path]:
    """Write `report.md`, `report.html`, `table.csv` and `figures/*.svg`, over those of an earlier report.

    Args:
        records: With `adapt.json`, and `<arm>/seed<k>/result.json` below it.
        folder: Made if need be; other files in it stay.

    Raises:
        ValueError: if there is no record, one is not readable, or nothing can be written.
    """
    settings = read_settings(records)
    found = read_records(records)
    if settings is None or not found:
        raise ValueError(f"no finished record below {records}; run `gated-attention adapt` first")
    findings = compare_arms(found)
    lines: dict[str, dict[int, Sequence[Mapping[str, Any]]]] = {}
    for one in found:
        if one.tokens_seen:
            metrics = read_metrics(arm_folder(records, one.arm, one.seed) / METRICS_NAME)
            lines.setdefault(one.arm, {})[one.seed] = metrics
    files = {"table.csv": "table.csv"}
    if records.resolve().is_relative_to(folder.resolve()):
        files["records"] = records.resolve().relative_to(folder.resolve()).as_posix()
    blocks = with_contents(_document(settings, findings, lines, files, list(unfinished(records))))
    names = [f"{FOLDER}/{name}.svg" for name in NAMES]
    return write_document(folder, "report", blocks, {"table.csv": csv_text(findings)}, names)


def _document(
    settings: Mapping[str, Any], findings: Findings, lines: Lines, files: Mapping[str, str], waiting: Sequence[str]
) -> Iterator[Block]:
    data = settings["data"]
    name = source_name(settings["model"])
    runs = [run for arm in findings.arms for run in arm.runs]
    original, trained = runs[0], [run for run in runs if run.tokens_seen]
    colors = {label: stroke.color for label, stroke in strokes_for(arm.name for arm in findings.arms).items()}
    yield Heading(f"Adaptation of {name}", level=1)
    yield Paragraph(
        f"Gates for `{name}` ({count_text(original.num_parameters)} parameters), which has none, trained to remove its "
        "attention sink while it keeps its quality: what is measured before, after, and beside training without them.",
        "lead",
    )
    yield Heading("Results")
    if sentence := _outcome(findings):
        yield Paragraph(sentence)
    main, changes = main_table(findings), change_table(findings)
    yield TableBlock(main, colors)
    uniform = original.measures["f_attn_uniform"]
    notes = f"± is the standard deviation over seeds. Attention spread evenly would give F-Attn {uniform:.4f}."
    if waiting:
        notes += f" Not finished: {', '.join(waiting)}."
    yield Paragraph(notes, "note")
    yield Bullets([f"**{arm.name}**: {_ARMS[arm.name]}" for arm in findings.arms])
    verdicts = verdict_table(findings)
    if verdicts.rows:
        yield Heading("Verdict", level=3)
        yield TableBlock(verdicts, colors)
        yield Paragraph(f"The reference is `{findings.reference}`. {RULE}", "note")
    if len(changes.columns) > 1:
        yield Heading("What hurts", level=3)
        yield TableBlock(changes, colors)
        yield Paragraph(
            f"The window is {settings['window'] or data['block_size'] // 4} tokens; YaRN's factor is "
            f"{settings['yarn']:g}.", "note",
        )  # fmt: skip
    if missing := dict.fromkeys(reason for run in runs for reason in run.missing.values()):
        yield Bullets([f"Not measured: {reason}" for reason in missing])
    yield Links("Data", files)
    yield Heading("Figures")
    yield from adapt_figures(findings, lines, data["block_size"])
    yield Heading("Setup")
    yield Bullets(list(_setup(settings, trained, original)))
    yield Heading("Definitions")
    yield explained("All columns", main, verdicts, changes)
    yield Heading("Limitations")
    yield Bullets(list(_limitations(findings, original)))
    yield Heading("Reproduce")
    arms = [arm.name for arm in findings.arms if arm.runs[0].tokens_seen]
    yield CodeBlock(adapt_command(settings, arms, max((run.seed for run in trained), default=0) + 1))
    commits = dict.fromkeys(run.git_commit or "not from a checkout" for run in runs)
    versions = ", ".join(f"{library} {version}" for library, version in original.versions.items())
    yield Paragraph(f"Commit: {', '.join(commits)}. {versions}.", "note")


def _outcome(findings: Findings) -> str:
    """The main finding in a sentence or two."""
    gated, control = findings.arm("gated"), findings.arm(findings.reference)
    if gated is None or control is None or gated.difference is None:
        return ""
    before, after = ({name: arm.over_seeds(name) for name in ("f_attn", "m_act")} for arm in (control, gated))
    if not (before["f_attn"] and before["m_act"] and after["f_attn"] and after["m_act"]):
        return ""

    def size(found: Mapping[str, Spread | None]) -> str:
        return number_text(found["m_act"].mean if found["m_act"] else None, significant(3))

    seeds = len(gated.rises)
    evidence = "" if seeds >= ENOUGH_SEEDS else f" This is {seeds} seed{'s' * (seeds != 1)}, no evidence yet."
    return (
        f"With gates and penalties F-Attn is {after['f_attn'].mean:.4f} and M-Act {size(after)}, where "
        f"`{control.name}` has {before['f_attn'].mean:.4f} and {size(before)}; the loss differs by "
        f"{gated.difference.mean:+.4f} nats. By the rule below, first-token attention is **{gated.fate('f_attn')}**, "
        f"massive activations are **{gated.fate('m_act')}**, and quality is **{gated.quality}**.{evidence}"
    )


def _setup(settings: Mapping[str, Any], trained: Sequence[Adapted], original: Adapted) -> Iterator[str]:
    train, data = settings["train"], settings["data"]
    variant = get_variant(settings["variant"])
    layers = settings["layers"]
    place = (
        "all layers"
        if layers is None
        else f"layers {layers if isinstance(layers, str) else ', '.join(map(str, layers))}"
    )
    gated = next((run for run in trained if run.num_gate_parameters), None)
    added = f", {count_text(gated.num_gate_parameters)} parameters" if gated else ""
    yield f"Gates: {variant.name} ({variant.describe()}) in {place}{added}; they start by changing nothing."
    what = {"whole": "the whole model", "lora": f"LoRA of rank {train['lora_rank']}", "gates": "the gates alone"}
    first = f", after {train['gate_steps']:,} steps of the gates alone" if train["gate_steps"] else ""
    rate = train["learning_rate"]
    yield (
        f"Trained: {what[train['trained']]}{first}; {train['steps']:,} steps of "
        f"{train['batch_size'] * train['accumulation']} x {data['block_size']:,} tokens, learning rate {rate:g}, "
        f"of gates {rate * train['gate_learning_rate']:g}."
    )
    fit = "cross-entropy" if train["fit"] == "ce" else "KL divergence from the original"
    yield (
        f"Loss: {fit} + {train['sink_weight']:g} x mean attention to token 0 + {train['activation_weight']:g} x mean "
        "over layers of log max |h|. The control has the cross-entropy alone."
    )
    held_out = f"`{source_name(data['validation'])}`" if data["validation"] else "documents held out of it"
    yield (
        f"Text: `{source_name(data['source'])}`; measured on {held_out}, about "
        f"{count_text(settings['num_tokens'])} tokens."
    )
    yield f"Device: {original.device}, {train['precision']}."


def _limitations(findings: Findings, original: Adapted) -> Iterator[str]:
    if original.doubt:
        yield f"Original: {original.doubt}"
    seeds = {len(arm.seeds) for arm in findings.arms if arm.runs[0].tokens_seen}
    if seeds and min(seeds) < ENOUGH_SEEDS:
        yield f"Fewer than {ENOUGH_SEEDS} seeds: the numbers have little or no spread."
    yield "A seed sets the order of the text; the weights at the start are the original's in every seed."
    yield (
        "Losses are on text like that of the training: what the model forgets elsewhere is not measured here; "
        "`gated-attention evaluate` on other text and tasks tells."
    )
    if original.measures.get("sink_rate", 0.0) == 0.0:
        yield "In the original no head gives the first token more than 0.3 of its attention: there is little to remove."
