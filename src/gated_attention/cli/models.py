"""The commands on existing models, of this package or others: analyse, evaluate, convert."""

from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from gated_attention.files import claimed

model_commands = typer.Typer()

_Kind = TypeVar("_Kind", int, float)

TextField = Annotated[str, typer.Option(help="The field that holds the text in JSON, Parquet and hub data sets.")]
Device = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")]


@model_commands.command()
def analyze(
    models: Annotated[
        list[str], typer.Argument(help="Folders with a model, runs of `compare` (<variant>/seed<k>), or hub names.")
    ],
    data: Annotated[
        str, typer.Option(help="Text to read: a file, a folder, a hub name, or 'stdlib', as for `compare`.")
    ] = "stdlib",
    text_field: TextField = "text",
    tokens: Annotated[int, typer.Option(help="Tokens that each model reads, about.")] = 65_536,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens per passage; default: 1024, or the model's positions if fewer.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="One for all models; default: the one beside each model.", show_default=False)
    ] = None,
    level: Annotated[
        str, typer.Option(help="'full', or 'summary', which leaves out what needs every attention weight.")
    ] = "full",
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the page, the data and the figures.")] = Path(
        "reports/analysis"
    ),
) -> None:
    """Look inside causal language models: attention sinks, massive activations, gates.

    Writes a page that compares the models, analysis.json, measures.csv and figures.
    """
    from gated_attention.ranges import require_choice
    from gated_attention.registry.choices import DEVICES, LEVELS

    require_choice("device", device, DEVICES)
    require_choice("level", level, LEVELS)

    from gated_attention.device import pick_device
    from gated_attention.jobs.analyze import AnalysisPlan, analyze
    from gated_attention.report.analysis.terminal import AnalysisDisplay
    from gated_attention.report.analysis.write import write_analysis

    chosen = pick_device(device)
    plan = AnalysisPlan(tuple(models), data, text_field, tokens, context, tokenizer, level)
    display = AnalysisDisplay()
    with claimed(output):
        with display:
            analyses = list(analyze(plan, chosen, display.say, display.track))
        write_analysis(plan, analyses, output)
    display.summary(analyses, output)


@model_commands.command()
def demo(
    models: Annotated[
        list[str], typer.Argument(help="Folders with a model, runs of `compare` (<variant>/seed<k>), or hub names.")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Text to read; default: a sentence on a cat and a dog.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to draw, e.g. 0,13,27; default: first, middle and last.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="One for all models; default: the one beside each model.", show_default=False)
    ] = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="The figure, .png or .svg.")] = Path("demo.png"),
) -> None:
    """Show what models look at in one prompt: attention maps, sinks and gates, side by side in one figure."""
    from gated_attention.ranges import require_choice
    from gated_attention.registry.choices import DEVICES

    require_choice("device", device, DEVICES)

    from rich.console import Console

    from gated_attention.device import pick_device
    from gated_attention.report.analysis.demo import DEFAULT_PROMPT, DemoPlan, parse_layers, summary_table
    from gated_attention.report.analysis.demo import demo as read_and_draw
    from gated_attention.report.tables import rich_table

    text = DEFAULT_PROMPT if prompt is None else prompt
    plan = DemoPlan(tuple(models), text, parse_layers(layers), tokenizer, output)
    console = Console()
    readings = read_and_draw(plan, pick_device(device), lambda message: console.print(f"[dim]{message}[/]"))
    console.print(rich_table(summary_table(readings)))
    console.print(f"figure: {output}", soft_wrap=True)


@model_commands.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, a run of `compare`, or a hub name.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas: perplexity, length, retrieval, quantization, hellaswag, mmlu, gsm8k, humaneval, "
            "ceval, cmmlu, ruler."
        ),
    ] = "perplexity",
    data: Annotated[str, typer.Option(help="Text to read, as for `compare`.")] = "stdlib",
    text_field: TextField = "text",
    field: Annotated[str, typer.Option(help="The field that names a text's domain.")] = "domain",
    tokens: Annotated[int, typer.Option(help="Tokens of text that a task reads, about.")] = 262_144,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context; default: 4096, or the model's positions if fewer.", show_default=False),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Perplexity of documents' first context ('start') or of all ('sliding').")
    ] = "start",
    stride: Annotated[
        int | None, typer.Option(help="Advance of sliding windows; default: half the context.", show_default=False)
    ] = None,
    multiples: Annotated[str, typer.Option(help="Lengths of the task length, in contexts.")] = "1,2,4,8",
    lengths: Annotated[
        str, typer.Option(help="Tokens, for retrieval and ruler; default: the context.", show_default=False)
    ] = "",
    yarn: Annotated[
        str, typer.Option(help="YaRN factors, e.g. 2,4,8; each is measured beside plain RoPE.", show_default=False)
    ] = "",
    rope_theta: Annotated[
        float | None, typer.Option(help="Another RoPE base, e.g. 1000000.", show_default=False)
    ] = None,
    depths: Annotated[str, typer.Option(help="Where retrieval hides its needles, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Retrieval's questions for each length and depth.")] = 8,
    seed: Annotated[int, typer.Option(help="Of retrieval's questions.")] = 0,
    filler: Annotated[
        str | None, typer.Option(help="Text to hide needles in, as --data; default: generated.", show_default=False)
    ] = None,
    local_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of benchmark files, <task>_<split>.jsonl; default: the hub.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Benchmark items at most.", show_default=False)] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples in a benchmark's prompt; default: the usual.", show_default=False)
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Let humaneval run what the model writes.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Default: the one beside the model.", show_default=False)
    ] = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the data and the figures.")] = Path("reports/evaluation"),
) -> None:
    """Say how good a causal language model is: perplexity, benchmarks, long context, retrieval, quantisation.

    Writes evaluation.html, evaluation.md, evaluation.json, evaluation.csv and figures.
    """
    from gated_attention.ranges import require_choice
    from gated_attention.registry.choices import DEVICES, MODES, TASKS, split_names

    chosen_tasks = split_names(tasks, "task")
    for task in chosen_tasks:
        require_choice("task", task, TASKS)
    require_choice("device", device, DEVICES)
    require_choice("mode", mode, MODES)

    from gated_attention.device import pick_device
    from gated_attention.jobs.evaluate import evaluate as run
    from gated_attention.jobs.evaluation_plan import EvaluationPlan
    from gated_attention.report.evaluation.write import print_evaluation, write_evaluation

    plan = EvaluationPlan(
        model=model,
        tasks=tuple(chosen_tasks),
        source=data,
        text_field=text_field,
        domain_field=field,
        num_tokens=tokens,
        context=context,
        tokenizer=tokenizer,
        mode=mode,
        stride=stride,
        multiples=tuple(_numbers(multiples, int, "--multiples")),
        lengths=tuple(_numbers(lengths, int, "--lengths")),
        yarn=tuple(_numbers(yarn, float, "--yarn")),
        rope_theta=rope_theta,
        depths=tuple(_numbers(depths, float, "--depths")),
        num_samples=samples,
        seed=seed,
        filler=filler,
        local=local_dir,
        limit=limit,
        shots=shots,
        run_code=run_code,
    )
    chosen = pick_device(device)
    with claimed(output):
        evaluation = run(plan, chosen, typer.echo, lambda found: write_evaluation(found, output))
    print_evaluation(evaluation, output)


@model_commands.command()
def retrieval_data(
    output: Annotated[Path, typer.Argument(help="The JSON-lines file to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', a folder, a run of `compare`, or a hub name; lengths are in its tokens.")
    ],
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "1024",
    samples: Annotated[int, typer.Option(help="Documents for each length and depth.")] = 64,
    depths: Annotated[str, typer.Option(help="Where needles are hidden, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    seed: Annotated[int, typer.Option(help="Take another than in `evaluate`, whose seed is 0.")] = 1,
    filler: Annotated[
        str | None, typer.Option(help="Text to hide needles in, as --data; default: generated.", show_default=False)
    ] = None,
) -> None:
    """Write retrieval documents to train on: put the file in the folder that --data names."""
    from gated_attention.jobs.retrieval_data import write_retrieval_data

    count = write_retrieval_data(
        output,
        tokenizer,
        lengths=_numbers(lengths, int, "--lengths"),
        depths=_numbers(depths, float, "--depths"),
        num_samples=samples,
        seed=seed,
        filler=filler,
    )
    typer.echo(f"wrote {count} documents to {output}")


@model_commands.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub name: owner/repository or owner/repository/folder.")],
    target: Annotated[Path, typer.Argument(help="Folder to write: absent or empty.")],
    to: Annotated[
        str, typer.Option(help="'gated', or what servers know: 'qwen3_next', 'qwen3_5', 'llama_cpp'.")
    ] = "gated",
    add_gate: Annotated[
        str | None, typer.Option(help="Variant whose gates a model without any gets.", show_default=False)
    ] = None,
    init: Annotated[
        str, typer.Option(help="Start of added gates: 'zeros' changes nothing at first, or 'normal'.")
    ] = "zeros",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 500MB or 2GB.")] = "1GB",
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Put the model's code beside it, for trust_remote_code=True.")
    ] = False,
) -> None:
    """Convert a checkpoint: the paper's release, Qwen3, Qwen3-Next, Qwen3.5 in; Qwen3-Next, Qwen3.5 out."""
    from gated_attention.registry.variants import gates_of

    gates = gates_of(add_gate) if add_gate is not None else None

    from gated_attention.models.convert import convert as convert_checkpoint
    from gated_attention.models.convert.storage import parse_size

    done = convert_checkpoint(
        source,
        target,
        cast(Any, to),
        gates,
        init=cast(Any, init),
        max_shard_bytes=parse_size(max_shard_size),
        self_contained=self_contained,
    )
    typer.echo("\n".join(done.describe()))


def _numbers(text: str, kind: type[_Kind], option: str) -> list[_Kind]:
    """The numbers of a list with commas."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas") from None
