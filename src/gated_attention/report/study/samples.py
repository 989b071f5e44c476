"""What the variants of a study write, prompt by prompt."""

from collections.abc import Iterator

from gated_attention.report.blocks import Block, CodeBlock, Details, Heading, Paragraph
from gated_attention.report.study.figures import Arms


def sample_generations(arms: Arms) -> Iterator[Block]:
    """Continuations by the first run of each variant that has some; nothing for records without."""
    samples = {label: next((run.samples for run in runs if run.samples), ()) for label, runs in arms.items()}
    prompts = dict.fromkeys((sample.prompt, sample.held_out) for found in samples.values() for sample in found)
    if not prompts:
        return
    yield Heading("Samples")
    yield Paragraph(
        "Held-out passages, and how the first seed of each variant continues them when it always takes the likeliest "
        "token. Samples show what these losses look like; they do not rank the variants."
    )
    for number, (prompt, held_out) in enumerate(prompts, start=1):
        texts = {"Prompt": prompt, "Held-out text": held_out}
        for label, found in samples.items():
            texts |= {f"`{label}`": one.continuation for one in found if one.prompt == prompt}
        blocks: list[Block] = []
        for name, text in texts.items():
            shown = text if text.strip() else f"({len(text)} blank characters)"
            blocks += [Paragraph(name, "name"), CodeBlock(shown, "text")]
        yield Details(f"Passage {number} of {len(prompts)}", blocks, is_open=number == 1)
