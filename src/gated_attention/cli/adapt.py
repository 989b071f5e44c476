"""The command that trains gates into a model that has none."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option, Typer

from gated_attention.cli.models import Device, TextField
from gated_attention.files import cache_folder, claimed

adapt_commands = Typer()


@adapt_commands.command()
def adapt(
    model: Annotated[str, Argument(help="A model without gates: a folder, a run of `compare`, or a hub name.")],
    data: Annotated[
        str, Option(help="Training text: a file, a folder, a hub name, or 'stdlib', as for `compare`.")
    ] = "stdlib",
    validation: Annotated[str | None, Option(help="Held-out text; default: documents held out of --data.")] = None,
    text_field: TextField = "text",
    variant: Annotated[str, Option(help="Variant whose gates are added.")] = "sdpa-elementwise",
    layers: Annotated[
        str | None, Option(help="Layers that get gates: indices, e.g. 0-3,7, or a type, e.g. full_attention.")
    ] = None,
    train: Annotated[
        Literal["whole", "lora", "gates"], Option(help="What is trained: every weight, gates and LoRA, or gates alone.")
    ] = "whole",
    lora_rank: Annotated[int, Option(help="Rank of LoRA on the projections; needs PEFT.")] = 32,
    gate_steps: Annotated[int, Option(help="Steps at the beginning that train the gates alone.")] = 0,
    loss: Annotated[
        Literal["ce", "kl"], Option(help="ce: cross-entropy on the text; kl: divergence from the original model.")
    ] = "ce",
    sink_weight: Annotated[float, Option(help="Factor on the mean attention to the first token.")] = 1.0,
    activation_weight: Annotated[float, Option(help="Factor on log max |h|, mean over layers.")] = 0.05,
    steps: Annotated[int, Option(help="Optimizer steps.")] = 1200,
    batch_size: Annotated[int, Option(help="Sequences per pass.")] = 8,
    accumulation: Annotated[int, Option(help="Passes per step.")] = 1,
    context: Annotated[
        int | None, Option(help="Tokens per sequence; default: 1024, or the model's positions if fewer.")
    ] = None,
    bos: Annotated[
        bool | None, Option("--bos/--no-bos", help="Begin every sequence with BOS; default: as the tokenizer does.")
    ] = None,
    learning_rate: Annotated[
        float | None, Option(help="Peak rate of everything but gates; default: 5e-5, with LoRA 1e-3.")
    ] = None,
    gate_learning_rate: Annotated[float, Option(help="Peak rate of gates.")] = 1e-3,
    seeds: Annotated[int, Option(help="Seeds per arm; a seed is an order of the text, the same in all arms.")] = 1,
    arms: Annotated[
        str,
        Option(
            help="gated: gates and penalties; control: plain training on the same tokens; penalties: without gates. "
            "--arms gated trains no control."
        ),
    ] = "gated,control,penalties",
    tokens: Annotated[int, Option(help="About how many held-out tokens each measure reads.")] = 65_536,
    window: Annotated[
        int | None, Option(help="Tokens that attention sees in the measure of a window; default: a quarter context.")
    ] = None,
    yarn: Annotated[float, Option(help="YaRN's factor in the measure of what it costs.")] = 4.0,
    checkpoint_every: Annotated[int | None, Option(help="Steps between checkpoints; default: a quarter.")] = None,
    tokenizer: Annotated[str | None, Option(help="Default: the one beside the model.")] = None,
    device: Device = "auto",
    output: Annotated[Path, Option(help="Folder for model/, records/ and the page.")] = Path("adapted"),
) -> None:
    """Give a pretrained causal model gates, and train them to remove its attention sink while it keeps its quality.

    Writes the model, and a page that compares it with the original and with controls. Run the same command again to
    resume; finished arms are kept, and more --seeds or --arms may be asked for.
    """
    from gated_attention.ranges import require_choice
    from gated_attention.registry.choices import ARMS, split_names
    from gated_attention.registry.variants import gates_of

    chosen_arms = split_names(arms, "arm")
    for arm in chosen_arms:
        require_choice("arm", arm, ARMS)
    gates_of(variant)

    from gated_attention.device import pick_device
    from gated_attention.jobs.adapt import adapt as run
    from gated_attention.jobs.adapt_plan import make_adapt_plan
    from gated_attention.models.convert.any_family import parse_layers
    from gated_attention.report.adapt.page import write_adapt_report
    from gated_attention.report.adapt.terminal import AdaptDisplay

    chosen, where = pick_device(device), parse_layers(layers)
    plan = make_adapt_plan(
        model=model, variant=variant, output=output, device=chosen, arms=tuple(chosen_arms), seeds=seeds,
        layers=tuple(where) if isinstance(where, list) else where, num_tokens=tokens, window=window, yarn=yarn,
        gate_learning_rate=gate_learning_rate,
        data={
            "source": data, "validation": validation, "text_field": text_field, "tokenizer": tokenizer,
            "block_size": context, "bos": bos,
        },
        train={
            "trained": train, "lora_rank": lora_rank, "gate_steps": gate_steps, "fit": loss, "steps": steps,
            "sink_weight": sink_weight, "activation_weight": activation_weight, "batch_size": batch_size,
            "accumulation": accumulation, "learning_rate": learning_rate, "checkpoint_every": checkpoint_every,
        },
    )  # fmt: skip
    display = AdaptDisplay()
    with claimed(output):
        with display:
            found = run(plan, chosen, cache_folder(), display, lambda: write_adapt_report(plan.records, output))
        write_adapt_report(plan.records, output)
    display.summary(plan, found)
