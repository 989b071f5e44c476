"""The commands on existing models, of this package or others: analyze, demo, evaluate, retrieval-data, convert."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from typer import Argument, Option, Typer, echo

from gated_attention.files import claimed
from gated_attention.registry.choices import TASKS, split_names
from gated_attention.registry.variants import gates_of
from gated_attention.spec import Init

model_commands = Typer()

_Kind = TypeVar("_Kind", int, float)

Device = Annotated[Literal["auto", "cpu", "cuda"], Option(help="Where models run; auto is a GPU if there is one.")]
TextField = Annotated[str, Option(help="The field that holds the text in JSON, Parquet and hub data sets.")]
_Models = Annotated[
    list[str], Argument(help="Folders with a model, runs of `compare` (<variant>/seed<k>), or hub names.")
]
_OneTokenizer = Annotated[str | None, Option(help="One for all models; default: the one beside each model.")]
_Depths = Annotated[str, Option(help="Where retrieval hides its needles, 0 to 1.")]
_Filler = Annotated[str | None, Option(help="Text to hide needles in, as --data; default: generated.")]


@model_commands.command()
def analyze(
    models: _Models,
    data: Annotated[
        str,
        Option(help="Text to read: a file, a folder, a hub name, or 'stdlib', as for `compare`; or images."),
    ] = "stdlib",
    text_field: TextField = "text",
    tokens: Annotated[int, Option(help="About how many tokens each model reads.")] = 65_536,
    context: Annotated[
        int | None, Option(help="Tokens per passage; default: 1024, or the model's positions if fewer.")
    ] = None,
    tokenizer: _OneTokenizer = None,
    level: Annotated[
        Literal["full", "summary"], Option(help="summary leaves out what needs every attention weight.")
    ] = "full",
    ablate: Annotated[
        int, Option(help="Also replace each head by its mean, and measure the loss on that many passages.")
    ] = 0,
    device: Device = "auto",
    output: Annotated[Path, Option(help="Folder for the page, the data and the figures.")] = Path("reports/analysis"),
) -> None:
    """Look inside models of text or images: attention sinks, massive activations, gates.

    Writes a page that compares the models, analysis.json, measures.csv and figures.
    """
    from gated_attention.device import pick_device
    from gated_attention.jobs.analyze import AnalysisPlan, analyze
    from gated_attention.report.analysis.page import write_analysis
    from gated_attention.report.analysis.terminal import AnalysisDisplay

    chosen = pick_device(device)
    plan = AnalysisPlan(tuple(models), data, text_field, tokens, context, tokenizer, level, ablate)
    display = AnalysisDisplay()
    with claimed(output):
        with display:
            analyses = list(analyze(plan, chosen, display.say, display.track))
        write_analysis(plan, analyses, output)
    display.summary(analyses, output)


@model_commands.command()
def demo(
    models: _Models,
    prompt: Annotated[str | None, Option(help="Text to read; default: a sentence about a cat and a dog.")] = None,
    layers: Annotated[str | None, Option(help="Layers to draw, e.g. 0,13,27; default: first, middle and last.")] = None,
    tokenizer: _OneTokenizer = None,
    device: Device = "auto",
    output: Annotated[Path, Option(help="The figure, .png or .svg.")] = Path("demo.png"),
) -> None:
    """Draw what models attend to in one prompt: attention maps, sinks and gates, side by side in one figure."""
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
    model: Annotated[str, Argument(help="A model's folder, a run of `compare`, or a hub name.")],
    tasks: Annotated[str, Option(help=f"Separated by commas: {', '.join(TASKS)}.")] = "perplexity",
    data: Annotated[str, Option(help="Text to read, as for `compare`.")] = "stdlib",
    text_field: TextField = "text",
    field: Annotated[str, Option(help="The field that names a text's domain.")] = "domain",
    tokens: Annotated[int, Option(help="About how many tokens of text a task reads.")] = 262_144,
    context: Annotated[
        int | None, Option(help="Tokens of context; default: 4096, or the model's positions if fewer.")
    ] = None,
    mode: Annotated[
        Literal["start", "sliding"],
        Option(help="start: perplexity of each document's first context; sliding: of all of it."),
    ] = "start",
    stride: Annotated[int | None, Option(help="Advance of sliding windows; default: half the context.")] = None,
    multiples: Annotated[str, Option(help="Lengths of the task length, in contexts.")] = "1,2,4,8",
    lengths: Annotated[str, Option(help="Tokens, for retrieval and ruler; default: the context.")] = "",
    yarn: Annotated[str, Option(help="YaRN factors, e.g. 2,4,8; each is measured beside plain RoPE.")] = "",
    rope_theta: Annotated[float | None, Option(help="Another RoPE base, e.g. 1000000.")] = None,
    depths: _Depths = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, Option(help="Retrieval's questions per length and depth.")] = 8,
    seed: Annotated[int, Option(help="Seed of retrieval's questions.")] = 0,
    filler: _Filler = None,
    local_dir: Annotated[
        Path | None, Option(help="Folder of benchmark files, <task>_<split>.jsonl; default: the hub.")
    ] = None,
    limit: Annotated[int | None, Option(help="Largest number of items per benchmark.")] = None,
    shots: Annotated[int | None, Option(help="Examples in a benchmark's prompt; default: the usual.")] = None,
    run_code: Annotated[bool, Option("--run-code", help="Let humaneval run the code that the model writes.")] = False,
    tokenizer: Annotated[str | None, Option(help="Default: the one beside the model.")] = None,
    device: Device = "auto",
    output: Annotated[Path, Option(help="Folder for the data and the figures.")] = Path("reports/evaluation"),
) -> None:
    """Measure how good a causal language model is: perplexity, benchmarks, long context, retrieval, quantisation.

    Writes evaluation.html, evaluation.md, evaluation.json, evaluation.csv and figures.
    """
    chosen_tasks = split_names(tasks, "task", TASKS)

    from gated_attention.device import pick_device
    from gated_attention.jobs.evaluation import evaluate as run
    from gated_attention.jobs.evaluation_plan import EvaluationPlan
    from gated_attention.report.evaluation.page import write_evaluation
    from gated_attention.report.evaluation.terminal import print_evaluation

    plan = EvaluationPlan(
        model=model, tasks=tuple(chosen_tasks), source=data, text_field=text_field, domain_field=field,
        num_tokens=tokens, context=context, tokenizer=tokenizer, mode=mode, stride=stride,
        multiples=_numbers(multiples, int, "--multiples"), lengths=_numbers(lengths, int, "--lengths"),
        yarn=_numbers(yarn, float, "--yarn"), rope_theta=rope_theta,
        depths=_numbers(depths, float, "--depths"), num_samples=samples, seed=seed, filler=filler,
        local=local_dir, limit=limit, shots=shots, run_code=run_code,
    )  # fmt: skip
    chosen = pick_device(device)
    with claimed(output):
        evaluation = run(plan, chosen, echo, lambda found: write_evaluation(found, output))
    print_evaluation(evaluation, output)


@model_commands.command()
def retrieval_data(
    output: Annotated[Path, Argument(help="The JSON-lines file to write.")],
    tokenizer: Annotated[
        str, Option(help="'bytes', a folder, a run of `compare`, or a hub name; lengths are in its tokens.")
    ],
    lengths: Annotated[str, Option(help="Tokens per document.")] = "1024",
    samples: Annotated[int, Option(help="Documents per length and depth.")] = 64,
    depths: _Depths = "0,0.25,0.5,0.75,1",
    seed: Annotated[int, Option(help="Choose another than in `evaluate`, whose seed is 0.")] = 1,
    filler: _Filler = None,
) -> None:
    """Write retrieval documents to train on; put the file in the folder that --data names."""
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
    echo(f"wrote {count} documents to {output}")


@model_commands.command()
def convert(
    source: Annotated[str, Argument(help="Folder or hub name: owner/repository or owner/repository/folder.")],
    target: Annotated[Path, Argument(help="Folder to write: absent or empty.")],
    to: Annotated[
        Literal["gated", "qwen3_next", "qwen3_5", "llama_cpp"],
        Option(metavar="<layout>", help="gated, or what servers read: qwen3_next, qwen3_5, llama_cpp."),
    ] = "gated",
    add_gate: Annotated[str | None, Option(help="Variant whose gates are added to a model that has none.")] = None,
    init: Annotated[Init, Option(help="Initialisation of added gates; zeros changes no output.")] = "zeros",
    layers: Annotated[
        str | None, Option(help="Layers that get gates: indices, e.g. 0-3,7, or a type, e.g. full_attention.")
    ] = None,
    attention: Annotated[
        Literal["all", "self", "cross"], Option(help="Attention that gets gates, in a model that has both kinds.")
    ] = "all",
    max_shard_size: Annotated[str, Option(help="Largest weight file, e.g. 500MB or 2GB.")] = "1GB",
    self_contained: Annotated[
        bool, Option("--self-contained", help="Put the model's code beside it, for trust_remote_code=True.")
    ] = False,
) -> None:
    """Convert a checkpoint: the paper's release, Qwen3, Qwen3-Next, Qwen3.5 in; Qwen3-Next, Qwen3.5 out.

    With --add-gate also any model of transformers that add_gates knows: Llama, Gemma, BERT, T5, ViT, Whisper.
    """
    gates = gates_of(add_gate) if add_gate is not None else None

    from gated_attention.models.convert import convert as convert_checkpoint
    from gated_attention.models.convert.any_family import parse_layers
    from gated_attention.models.convert.storage import parse_size
    from gated_attention.train.quiet import quiet

    max_bytes, chosen = parse_size(max_shard_size), parse_layers(layers)
    with quiet():
        done = convert_checkpoint(
            source, target, to, gates, init=init, max_shard_bytes=max_bytes, self_contained=self_contained,
            layers=chosen, attention=attention,
        )  # fmt: skip
    echo("\n".join(done.describe()))


def _numbers(text: str, kind: type[_Kind], option: str) -> tuple[_Kind, ...]:
    """The numbers in a list with commas."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give numbers separated by commas") from None
