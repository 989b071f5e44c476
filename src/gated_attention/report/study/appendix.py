"""The end of a report: cost, every run, definitions, limits, how to reproduce it."""

from collections.abc import Iterable, Iterator, Sequence

from gated_attention.registry.choices import TEXT
from gated_attention.report.blocks import Block, Bullets, CodeBlock, Details, Heading, Paragraph, TableBlock
from gated_attention.report.command_line import compare_command, train_commands, without_option
from gated_attention.report.study.sections import scale_text
from gated_attention.report.study.table import cost_table, runs_table
from gated_attention.study.comparison import Comparison
from gated_attention.study.record import Result
from gated_attention.study.statistics import CONFIDENCE


def cost(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """What the runs cost, and what training speeds do not show."""
    table = cost_table(results, comparison)
    if any("train_tokens_per_s" in run.measures for run in results):
        note = (
            "Time is training alone, tokens over the run's median tokens/s: evaluation, checkpoints and compilation "
            "come on top. Other work on a device slows its runs."
        )
        yield Details("Training time and cost", [TableBlock(table), Paragraph(note, "note")])


def every_run(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """The raw numbers; nothing where each variant has one run, which the comparison shows."""
    if len({run.variant for run in results}) < len(results):
        yield Heading("Every run")
        yield Details(f"{len(results)} runs", [TableBlock(runs_table(results, comparison))])


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
    of_text = comparison.task == TEXT
    if not of_text:
        held_out = held_out.replace("text", "images")
    scale = "Others found that a gate's effect changes with scale, and below 2M parameters even its sign"
    items += [
        f"Scale: {scale_text(results, comparison)}. {scale}{'' if of_text else ', in language models'}.",
        f"{one_rate if len(rates) == 1 else own_rate}; none was tuned for its own best.",
        f"Loss on held-out text{held_out}; no benchmark, no long context."
        if of_text
        else f"Loss and accuracy on held-out images{held_out}; one data set.",
    ]
    yield Heading("Limitations")
    yield Bullets(items)


def reproduction(results: Sequence[Result], comparison: Comparison) -> Iterator[Block]:
    """The command, the commit and the versions behind the runs."""
    yield Heading("Reproduce")
    if "engine" in results[0].config:
        yield CodeBlock(train_commands(results))
        yield origins(results)
        return
    yield CodeBlock(compare_command(results, comparison))
    yield origins(results, without_option(results))


def origins(results: Sequence[Result], notes: Iterable[str] = ()) -> Bullets:
    """The commits, devices and versions behind the runs, and notes."""
    commits = dict.fromkeys(run.git_commit or "not from a checkout" for run in results)
    devices = dict.fromkeys(run.device for run in results)
    versions = dict.fromkeys(f"{name} {version}" for run in results for name, version in run.versions.items())
    return Bullets(
        [
            f"Commit: {', '.join(f'`{commit}`' for commit in commits)}",
            f"Device: {', '.join(devices)}",
            f"Versions: {', '.join(versions)}",
            *notes,
            "Every setting of a run is in its `config.json`, every number in its `result.json`. "
            "This report follows from these files alone.",
        ]
    )
