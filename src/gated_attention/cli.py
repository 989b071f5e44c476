"""The command line: reads options, hands them to `studies`, prints what comes back."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_Kind = TypeVar("_Kind", int, float)

app = typer.Typer(
    name="gated-attention",
    help="Train, compare and inspect gated softmax attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Size = Annotated[str, typer.Option(help="tiny, xs, s, m, moe-tiny, moe-xs, moe-s, 1.7b-28l, 1.7b-48l or 15a2b.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; default by size.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(help="Training text: a file, a folder, a hub name, or 'stdlib', the source of Python's own library."),
]
Validation = Annotated[
    str | None, typer.Option(help="Held-out text; default: documents held out of --data.", show_default=False)
]
TextField = Annotated[str, typer.Option(help="The field that holds the text in JSON, Parquet and hub data sets.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="'bytes', 'bpe-N' trained on --data, or a folder or hub name; default by size.", show_default=False
    ),
]
Context = Annotated[int | None, typer.Option(help="Tokens per sequence; default by size.", show_default=False)]
Bos = Annotated[bool, typer.Option("--bos", help="Begin every sequence with the BOS token.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences per pass; default by size.", show_default=False)]
Accumulation = Annotated[int | None, typer.Option(help="Passes per step; default by size.", show_default=False)]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; default by size.", show_default=False)]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay on matrices.")]
Device = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU.", show_default=False)
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")]
Output = Annotated[Path, typer.Option(help="Folder for runs/<name>/ and reports/<name>/.")]
Seeds = Annotated[int, typer.Option(help="Seeds per variant; a seed pairs data order and weights across variants.")]
Name = Annotated[str | None, typer.Option(help="Name of the study.", show_default=False)]


@app.command()
def compare(
    variants: Annotated[
        str, typer.Option(help="Variants to train, separated by commas; `gated-attention variants` lists them.")
    ] = "baseline,sdpa-headwise,sdpa-elementwise",
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
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
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

    Run the same command again to go on where an interrupted one stopped; finished arms are kept.
    """
    from gated_attention.studies.display import Display
    from gated_attention.studies.plan import make_plan, pick_device
    from gated_attention.studies.report import write_report
    from gated_attention.studies.study import run_study

    chosen = pick_device(device)
    plan = make_plan(
        name=name,
        variants=[part.strip() for part in variants.split(",") if part.strip()],
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
        },
        train={
            "steps": steps,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "compile": compile,
        },
    )
    display = Display(plan, chosen)
    with display:
        results = run_study(plan, chosen, _cache_folder(), display)
    folder = plan.output / "reports" / plan.name
    write_report(plan.runs, folder)
    display.summary(results, folder)


@app.command()
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
    from gated_attention.studies.analysis_display import AnalysisDisplay
    from gated_attention.studies.analysis_report import prepare_folder, write_analysis
    from gated_attention.studies.analyze import AnalysisPlan, analyze
    from gated_attention.studies.plan import pick_device

    chosen = pick_device(device)
    plan = AnalysisPlan(tuple(models), data, text_field, tokens, context, tokenizer, level)
    prepare_folder(output)
    display = AnalysisDisplay()
    with display:
        analyses = list(analyze(plan, chosen, display.say, display.track))
    write_analysis(plan, analyses, output)
    display.summary(analyses, output)


@app.command()
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
    from rich.console import Console

    from gated_attention.studies.demo import DEFAULT_PROMPT, DemoPlan, parse_layers, summary_table
    from gated_attention.studies.demo import demo as read_and_draw
    from gated_attention.studies.plan import pick_device
    from gated_attention.studies.table import rich_table

    text = DEFAULT_PROMPT if prompt is None else prompt
    plan = DemoPlan(tuple(models), text, parse_layers(layers), tokenizer, output)
    console = Console()
    readings = read_and_draw(plan, pick_device(device), lambda message: console.print(f"[dim]{message}[/]"))
    console.print(rich_table(summary_table(readings)))
    console.print(f"figure: {output}", soft_wrap=True)


@app.command()
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

    Writes evaluation.json, evaluation.csv and figures.
    """
    from gated_attention.studies.evaluate import EvaluationPlan
    from gated_attention.studies.evaluate import evaluate as run
    from gated_attention.studies.evaluation_report import prepare_folder, print_evaluation, write_evaluation
    from gated_attention.studies.plan import pick_device

    plan = EvaluationPlan(
        model=model,
        tasks=tuple(dict.fromkeys(part.strip() for part in tasks.split(",") if part.strip())),
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
    prepare_folder(output)
    evaluation = run(plan, chosen, lambda message: typer.echo(message, err=True))
    write_evaluation(evaluation, output)
    print_evaluation(evaluation, output)


@app.command()
def retrieval_data(
    output: Annotated[Path, typer.Argument(help="The JSON-lines file to write.")],
    tokenizer: Annotated[str, typer.Option(help="'bytes', a folder or a hub name; lengths are in its tokens.")],
    lengths: Annotated[str, typer.Option(help="Tokens of a document.")] = "1024",
    samples: Annotated[int, typer.Option(help="Documents for each length and depth.")] = 64,
    depths: Annotated[str, typer.Option(help="Where needles are hidden, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    seed: Annotated[int, typer.Option(help="Take another than in `evaluate`, whose seed is 0.")] = 1,
    filler: Annotated[
        str | None, typer.Option(help="Text to hide needles in, as --data; default: generated.", show_default=False)
    ] = None,
) -> None:
    """Write retrieval documents to train on: put the file in the folder that --data names."""
    from gated_attention.studies.retrieval_data import write_retrieval_data

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


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="A study's folder, runs/<name>.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; default: reports/<name> beside runs.", show_default=False),
    ] = None,
) -> None:
    """Write a study's report again from its records."""
    from gated_attention.studies.report import write_report

    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder; give the folder of a study, runs/<name>")
    folder = output or runs.resolve().parent.parent / "reports" / runs.resolve().name
    write_report(runs, folder)
    typer.echo(f"wrote {folder / 'report.html'}")


@app.command()
def variants(
    name: Annotated[str | None, typer.Argument(help="One variant to look at closely.", show_default=False)] = None,
    size: Annotated[str, typer.Option(help="With NAME: the size to resolve it at.")] = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registry, or show one variant at a size.

    Added parameters are millions at the paper's 15A2B, beside what the paper prints; * marks where these disagree.
    """
    from gated_attention.sizes import get_size
    from gated_attention.studies import catalogue
    from gated_attention.studies.catalogue_display import print_registry, print_variant
    from gated_attention.studies.variants import get_variant

    if name is None:
        _echo_json(catalogue.registry()) if as_json else print_registry()
    else:
        chosen, shape = get_variant(name), get_size(size)
        _echo_json(catalogue.resolve(chosen, shape)) if as_json else print_variant(chosen, shape)


def _echo_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


def _numbers(text: str, kind: type[_Kind], option: str) -> list[_Kind]:
    """The numbers of a list with commas."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas") from None


def _cache_folder() -> Path:
    """Where packed data is kept between runs, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated_attention"


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input is one line and exit code 2, an interruption exit code 130."""
    try:
        app(arguments)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this
            typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
        raise
