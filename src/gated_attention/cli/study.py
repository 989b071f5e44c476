"""The commands on studies: train and compare variants, write a report again, list the registry."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option, Typer, echo

from gated_attention.cli.models import Device, TextField
from gated_attention.files import cache_folder, claimed
from gated_attention.ranges import require_choice, require_folder_name
from gated_attention.registry.architectures import ARCHITECTURES, OWN
from gated_attention.registry.choices import DEFAULT, DEFAULT_SIZES, STUDY_TASKS, TEXT, choose_variants, split_names
from gated_attention.registry.settings import SUSTAINED
from gated_attention.registry.vision import VISION_SIZES
from gated_attention.sizes import SIZES, get_size

study_commands = Typer()


@study_commands.command()
def compare(
    variants: Annotated[
        str | None,
        Option(
            help="Variants to train, separated by commas; `gated-attention variants` lists them. "
            f"Default: {','.join(DEFAULT)}."
        ),
    ] = None,
    table: Annotated[
        int | None, Option(help="Train all rows of this table of the paper instead: 1, 2, 3, 4 or 6.")
    ] = None,
    task: Annotated[
        str, Option(help="text trains language models; vision trains classifiers on Parquet files of labelled images.")
    ] = TEXT,
    architecture: Annotated[
        str, Option(help=f"One of {', '.join(ARCHITECTURES)}; all but {OWN} carry gates and nothing else.")
    ] = OWN,
    size: Annotated[
        str | None,
        Option(
            help=f"One of {', '.join(SIZES)}; of images {', '.join(VISION_SIZES)}. Default: "
            f"{' or '.join(DEFAULT_SIZES.values())}."
        ),
    ] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps; default by size.")] = None,
    seeds: Annotated[int, Option(help="Seeds per variant; a seed pairs data order and weights across variants.")] = 1,
    first_seed: Annotated[int, Option(help="The first of them; finished arms of others stay in the report.")] = 0,
    data: Annotated[
        str,
        Option(
            help="Training text: a file, a folder, a hub name, 'stdlib', the source of Python's own library, or token "
            "shards of `tokenize`; with --task vision Parquet files of images and labels."
        ),
    ] = "stdlib",
    validation: Annotated[str | None, Option(help="Held-out text; default: documents held out of --data.")] = None,
    text_field: TextField = "text",
    tokenizer: Annotated[
        str | None,
        Option(
            help="'bytes', 'bpe-N' trained on --data, a folder, a run of `compare`, or a hub name; default by size, or "
            "that of token shards."
        ),
    ] = None,
    context: Annotated[int | None, Option(help="Tokens per sequence; default by size.")] = None,
    bos: Annotated[bool, Option("--bos", help="Begin every sequence with the BOS token.")] = False,
    packing: Annotated[
        Literal["stream", "documents"],
        Option(help="stream: a token attends to all before it in its block; documents: to those of its own document."),
    ] = "stream",
    batch_size: Annotated[int | None, Option(help="Sequences per pass; default by size.")] = None,
    accumulation: Annotated[int | None, Option(help="Passes per step; default by size.")] = None,
    learning_rate: Annotated[float | None, Option(help="Peak learning rate; default by size.")] = None,
    warmup: Annotated[
        float | None, Option(help="Share of the steps in which the learning rate rises; default by size.")
    ] = None,
    weight_decay: Annotated[float, Option(help="AdamW's weight decay on matrices.")] = 0.1,
    device: Device = "auto",
    compile: Annotated[bool | None, Option("--compile/--no-compile", help="torch.compile; default: on a GPU.")] = None,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    output: Annotated[Path, Option(help="Folder for runs/<name>/ and reports/<name>/.")] = Path(),
    name: Annotated[str | None, Option(help="Name of the study.")] = None,
    start: Annotated[
        Path | None, Option("--from", help="Continue the arms of this study, runs/NAME, as a new study.")
    ] = None,
    rope_theta: Annotated[float | None, Option(help="RoPE's base; default: that of --from, or 10000.")] = None,
) -> None:
    """Train variants side by side, measure them, and write a report.

    Run the same command again to resume an interrupted study; finished arms are kept. Each GPU trains one arm at a
    time; CUDA_VISIBLE_DEVICES=0,1 uses two of them.
    """
    chosen_variants = None if variants is None else split_names(variants, "variant")
    require_choice("task", task, STUDY_TASKS)
    size = DEFAULT_SIZES[task] if size is None else size
    choose_variants(chosen_variants, table, size, architecture, task)  # refuses what is wrong before PyTorch loads
    if name is not None:
        require_folder_name("study name", name)

    from gated_attention.device import count_like, pick_device
    from gated_attention.report.study.page import write_report
    from gated_attention.report.study.terminal import Display
    from gated_attention.study.plan import make_plan
    from gated_attention.study.run import run_study

    chosen = pick_device(device)
    plan = make_plan(
        name=name, variants=chosen_variants, table=table, size=size, seeds=seeds, output=output, device=chosen,
        tensorboard=tensorboard, start=start, rope_theta=rope_theta, architecture=architecture,
        task=task, first_seed=first_seed,
        data={
            "source": data, "validation": validation, "text_field": text_field, "tokenizer": tokenizer,
            "block_size": context, "bos": bos, "packing": packing,
        },
        train={
            "steps": steps, "batch_size": batch_size, "accumulation": accumulation, "learning_rate": learning_rate,
            "warmup": warmup, "weight_decay": weight_decay, "compile": compile,
        },
    )  # fmt: skip
    num_devices = count_like(chosen)
    display = Display(plan, chosen, num_devices=num_devices)
    folder = plan.output / "reports" / plan.name
    with claimed(folder):
        with display:
            results = run_study(plan, chosen, cache_folder(), display, num_devices)
        write_report(plan.runs, folder)
    display.summary(results, folder)


@study_commands.command()
def study(
    file: Annotated[Path, Argument(help="The study, a TOML file; docs/studies.md has its keys.")],
    plan: Annotated[bool, Option("--plan", help="Print arms, tokens and expected minutes, and run nothing.")] = False,
    gpu: Annotated[str | None, Option(help=f"With --plan: one {', one '.join(SUSTAINED)}, wherever it runs.")] = None,
    output: Annotated[Path, Option(help="Folder for runs/<name>/ and reports/<name>/.")] = Path(),
) -> None:
    """Train a grid of variants, sizes, learning rates and other settings from one file, and write a report.

    Every setting of the file may be a list; lists are crossed. Run the same command again to resume: finished arms are
    kept, and an arm that fails is recorded and does not stop the others.
    """
    if gpu is not None:
        require_choice("GPU", gpu, SUSTAINED)
        if not plan:
            raise ValueError("--gpu is for the plan; add --plan")

    import torch

    from gated_attention.device import count_like, pick_device
    from gated_attention.report.grid.page import write_study_report
    from gated_attention.report.grid.terminal import GridDisplay, print_plan
    from gated_attention.study.grid.estimate import expect, find_speed, known_speed
    from gated_attention.study.grid.run import find_points, run_grid
    from gated_attention.study.grid.study_file import read_study

    wanted = read_study(file)
    device = pick_device(wanted.settings.device) if gpu is None else torch.device("cuda")
    plans = wanted.plans(output, device)
    runs = output / "runs" / wanted.settings.name
    if plan:
        if gpu is None:
            finished = [result for found in find_points(runs).values() for result in found]
            (speed, source), count = find_speed(device, finished), count_like(device)
        else:
            (speed, source), count = known_speed(gpu), 1
        print_plan(plans, [expect(one, device, speed) for one in plans], source, count)
        return
    display, folder = GridDisplay(plans, device, count_like(device)), output / "reports" / wanted.settings.name
    with claimed(folder):
        with display:
            results, failures = run_grid(wanted, output, device, cache_folder(), display)
        if results:
            write_study_report(runs, folder)
    display.close(results, failures, folder)


@study_commands.command()
def report(
    runs: Annotated[
        Path, Argument(help="A study's folder, runs/<name>, or one with `records`: a report's, or of `adapt`.")
    ],
    output: Annotated[
        Path | None, Option(help="Folder for the report; default: reports/<name> beside runs, or beside `records`.")
    ] = None,
) -> None:
    """Write the report of `compare`, `study` or `adapt` again from its records."""
    from gated_attention.jobs.adapt_record import SETTINGS_NAME
    from gated_attention.report.adapt.page import write_adapt_report
    from gated_attention.report.grid.page import write_study_report

    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder; give the folder of a study, runs/<name>")
    if (runs / "records").is_dir():
        folder, runs = output or runs, runs / "records"
    else:
        folder = output or runs.resolve().parent.parent / "reports" / runs.resolve().name
    write = write_adapt_report if (runs / SETTINGS_NAME).exists() else write_study_report
    with claimed(folder):
        write(runs, folder)
    echo(f"wrote {folder / 'report.html'}")


@study_commands.command()
def variants(
    name: Annotated[str | None, Argument(help="One variant to look at closely.")] = None,
    size: Annotated[
        str | None, Option(help="With NAME: the size to resolve it at, as in `compare`; default: tiny.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registry, or show one variant at a size.

    Added parameters are millions at the paper's 15A2B, beside what the paper prints; * marks where these disagree.
    """
    from gated_attention.registry.variants import get_variant
    from gated_attention.report import catalogue
    from gated_attention.report.catalogue_terminal import print_registry, print_variant

    if name is None:
        if size is not None:
            raise ValueError(f"--size {size} is for one variant; name it, e.g. variants baseline --size {size}")
        _echo_json(catalogue.registry()) if as_json else print_registry()
    else:
        chosen, shape = get_variant(name), get_size("tiny" if size is None else size)
        _echo_json(catalogue.resolve(chosen, shape)) if as_json else print_variant(chosen, shape)


def _echo_json(content: Any) -> None:
    echo(json.dumps(content, indent=2))
