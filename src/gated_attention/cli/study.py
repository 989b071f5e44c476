"""The commands on studies: train and compare variants, report again, list the registry."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gated_attention.cli.models import Device, TextField
from gated_attention.files import claimed

study_commands = typer.Typer()

Size = Annotated[str, typer.Option(help="tiny, xs, s, m, moe-tiny, moe-xs, moe-s, 1.7b-28l, 1.7b-48l or 15a2b.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; default by size.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(help="Training text: a file, a folder, a hub name, or 'stdlib', the source of Python's own library."),
]
Validation = Annotated[
    str | None, typer.Option(help="Held-out text; default: documents held out of --data.", show_default=False)
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="'bytes', 'bpe-N' trained on --data, a folder, a run of `compare`, or a hub name; default by size.",
        show_default=False,
    ),
]
Context = Annotated[int | None, typer.Option(help="Tokens per sequence; default by size.", show_default=False)]
Bos = Annotated[bool, typer.Option("--bos", help="Begin every sequence with the BOS token.")]
PackingOption = Annotated[
    str,
    typer.Option(
        "--packing", help="stream: a token sees all before it in its block; documents: those of its own document."
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per pass; default by size.", show_default=False)]
Accumulation = Annotated[int | None, typer.Option(help="Passes per step; default by size.", show_default=False)]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; default by size.", show_default=False)]
Warmup = Annotated[
    float | None,
    typer.Option(help="Share of the steps in which the learning rate rises; default by size.", show_default=False),
]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay on matrices.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU.", show_default=False)
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")]
Output = Annotated[Path, typer.Option(help="Folder for runs/<name>/ and reports/<name>/.")]
Seeds = Annotated[int, typer.Option(help="Seeds per variant; a seed pairs data order and weights across variants.")]
Name = Annotated[str | None, typer.Option(help="Name of the study.", show_default=False)]


@study_commands.command()
def compare(
    variants: Annotated[
        str | None,
        typer.Option(
            help="Variants to train, separated by commas; `gated-attention variants` lists them. "
            "Default: baseline,sdpa-headwise,sdpa-elementwise.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        int | None,
        typer.Option(help="Train all rows of this table of the paper instead: 1, 2, 3, 4 or 6.", show_default=False),
    ] = None,
    size: Size = "tiny",
    steps: Steps = None,
    seeds: Seeds = 1,
    data: Data = "stdlib",
    validation: Validation = None,
    text_field: TextField = "text",
    tokenizer: Tokenizer = None,
    context: Context = None,
    bos: Bos = False,
    packing: PackingOption = "stream",
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.1,
    device: Device = "auto",
    compile: Compile = None,
    tensorboard: TensorBoard = False,
    output: Output = Path(),
    name: Name = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from the arms of this study, runs/NAME, as a new one.", show_default=False),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="RoPE's base; default: that of --from, or 10000.", show_default=False)
    ] = None,
) -> None:
    """Train variants side by side, measure them, and write a report.

    Run the same command again to go on where an interrupted one stopped; finished arms are kept. Each GPU trains an arm
    of its own; CUDA_VISIBLE_DEVICES=0,1 takes two of them.
    """
    from gated_attention.registry.choices import check_study, split_names

    chosen_variants = None if variants is None else split_names(variants, "variant")
    check_study(device=device, size=size, variants=chosen_variants, table=table, name=name, packing=packing)

    from gated_attention.device import count_like, pick_device
    from gated_attention.report.study.page import write_report
    from gated_attention.report.study.terminal import Display
    from gated_attention.study.plan import make_plan
    from gated_attention.study.run import run_study

    chosen = pick_device(device)
    plan = make_plan(
        name=name,
        variants=chosen_variants,
        table=table,
        size=size,
        seeds=seeds,
        output=output,
        device=chosen,
        tensorboard=tensorboard,
        start=start,
        rope_theta=rope_theta,
        data={
            "source": data,
            "validation": validation,
            "text_field": text_field,
            "tokenizer": tokenizer,
            "block_size": context,
            "bos": bos,
            "packing": packing,
        },
        train={
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "learning_rate": learning_rate,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "compile": compile,
        },
    )
    num_devices = count_like(chosen)
    display = Display(plan, chosen, num_devices=num_devices)
    folder = plan.output / "reports" / plan.name
    with claimed(folder):
        with display:
            results = run_study(plan, chosen, _cache_folder(), display, num_devices)
        write_report(plan.runs, folder)
    display.summary(results, folder)


@study_commands.command()
def report(
    runs: Annotated[Path, typer.Argument(help="A study's folder, runs/<name>.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; default: reports/<name> beside runs.", show_default=False),
    ] = None,
) -> None:
    """Write a study's report again from its records."""
    from gated_attention.report.study.page import write_report

    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder; give the folder of a study, runs/<name>")
    folder = output or runs.resolve().parent.parent / "reports" / runs.resolve().name
    with claimed(folder):
        write_report(runs, folder)
    typer.echo(f"wrote {folder / 'report.html'}")


@study_commands.command()
def variants(
    name: Annotated[str | None, typer.Argument(help="One variant to look at closely.", show_default=False)] = None,
    size: Annotated[
        str | None,
        typer.Option(help="With NAME: the size to resolve it at, as in `compare`; default: tiny.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registry, or show one variant at a size.

    Added parameters are millions at the paper's 15A2B, beside what the paper prints; * marks where these disagree.
    """
    from gated_attention.registry.variants import get_variant
    from gated_attention.report import catalogue
    from gated_attention.report.catalogue_terminal import print_registry, print_variant
    from gated_attention.sizes import get_size

    if name is None:
        if size is not None:
            raise ValueError(f"--size {size} is for one variant; name it, e.g. variants baseline --size {size}")
        _echo_json(catalogue.registry()) if as_json else print_registry()
    else:
        chosen, shape = get_variant(name), get_size("tiny" if size is None else size)
        _echo_json(catalogue.resolve(chosen, shape)) if as_json else print_variant(chosen, shape)


def _echo_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


def _cache_folder() -> Path:
    """Where packed data is kept between runs, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated_attention"
