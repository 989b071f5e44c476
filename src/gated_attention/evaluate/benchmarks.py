"""Benchmarks through lm-evaluation-harness, with items from the hub or from local files."""

import copy
import logging
import os
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark is run.

    Attributes:
        harness: The harness's name for it.
        folder: Where the harness's tasks define it; indexing all of them takes seconds.
        shots: Examples in the prompt. The paper states none; these are usual for base models.
        split: The split whose items are scored.
        shot_split: The split that examples come from; empty where there are none.
    """

    harness: str
    folder: str
    shots: int
    split: str
    shot_split: str = ""


RULER = "ruler"
RULER_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that need no download: their haystacks are repeated sentences, needles, or words."""

BENCHMARKS: dict[str, Benchmark] = {
    "hellaswag": Benchmark("hellaswag", "hellaswag", 10, "validation", "train"),
    "mmlu": Benchmark("mmlu", "mmlu/default", 5, "test", "dev"),
    "gsm8k": Benchmark("gsm8k", "gsm8k", 5, "test", "train"),
    "humaneval": Benchmark("humaneval", "humaneval", 0, "test"),
    "ceval": Benchmark("ceval-valid", "ceval", 5, "val", "dev"),
    "cmmlu": Benchmark("cmmlu", "cmmlu", 5, "test", "dev"),
    RULER: Benchmark("ruler", "ruler", 0, "test"),
}
"""The benchmarks of Table 1 and of the text beside it."""

_MOST_TOKENS_PER_CHARACTER = 0.7  # above it, RULER's generators never end
_ENGLISH = "The special magic number hidden in this sentence is written in plain English words."


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """One metric of one task.

    Attributes:
        task: A benchmark's name; RULER's tasks are `ruler niah_single_1` and so on.
        metric: The harness's name, e.g. `acc_norm` or `exact_match, flexible-extract`; for RULER a length.
        value: Usually a share, 0 to 1.
        standard_error: The harness's, without bootstrap; None where it gives none.
        shots: Examples in the prompt.
        shots_from: The split they come from. If it is the scored split, no item is among its own examples.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    num_samples: int
    shots: int
    shots_from: str


def require_harness() -> None:
    """Raise a ValueError with the command that installs the harness if it is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError("benchmarks need lm-evaluation-harness; pip install 'gated-attention[evaluate]'")


def check_benchmark(tokenizer: PreTrainedTokenizerBase, name: str, *, local: Path | None, run_code: bool) -> None:
    """Refuse what can be refused before a model runs; arguments as in `run_benchmark`.

    Raises:
        ValueError: if the harness or a file is missing, the tokenizer does not suit, or code may not run.
    """
    require_harness()
    if name == "humaneval" and not run_code:
        raise ValueError("humaneval runs the program text that the model writes; allow it with --run-code")
    if name == RULER:
        share = len(tokenizer.encode(_ENGLISH, add_special_tokens=False)) / len(_ENGLISH)
        if share > _MOST_TOKENS_PER_CHARACTER:
            raise ValueError(
                f"ruler needs a sub-word tokenizer; this one makes {share:.2f} tokens per character of English"
            )
    elif local is not None:
        local_files(name, local)


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    context: int,
    batch_size: int,
    shots: int | None = None,
    limit: int | None = None,
    local: Path | None = None,
    lengths: Sequence[int] = (),
    run_code: bool = False,
) -> list[BenchmarkScore]:
    """The scores of one of `BENCHMARKS`.

    Args:
        context: Tokens of the longest prompt; longer ones lose their beginning.
        shots: None is the benchmark's usual number.
        limit: Most items per task.
        local: A folder with `<task>_<split>.jsonl` in the data sets' own fields, e.g. `gsm8k_test.jsonl` or
            `mmlu_anatomy_test.jsonl`; None reads the hub. Without a file of `shot_split`, examples come from the
            scored file.
        lengths: RULER's, in tokens.
        run_code: Allows HumanEval to run what the model writes.

    Raises:
        ValueError: as `check_benchmark`, and if the harness fails.
    """
    check_benchmark(tokenizer, name, local=local, run_code=run_code)
    from lm_eval import simple_evaluate
    from lm_eval import tasks as stock_tasks
    from lm_eval.models.huggingface import HFLM

    benchmark = BENCHMARKS[name]
    shots = benchmark.shots if shots is None else shots
    shown, shots_from, metadata = {benchmark.harness: name}, benchmark.shot_split, {}
    with tempfile.TemporaryDirectory() as folder:
        if name == RULER:
            shown = {task: f"{RULER} {task}" for task in RULER_TASKS}
            tokenizer.save_pretrained(folder)  # the harness loads it by path
            metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)}
        definitions = Path(stock_tasks.__file__).parent / benchmark.folder
        manager = stock_tasks.TaskManager(include_path=definitions, include_defaults=False, metadata=metadata)
        tasks: list[Any] = list(shown)
        if local is not None and name != RULER:
            local_tasks, shots_from = _local_tasks(name, local, manager.all_subtasks)
            shown = dict.fromkeys((task["task"] for task in local_tasks), name)
            tasks = [{"group": "local", "task": local_tasks}]
        try:
            with _silence(), patch_environment(HF_ALLOW_CODE_EVAL=int(run_code)):
                found = simple_evaluate(
                    model=HFLM(  # the harness gives the tokenizer a padding token, hence the copy
                        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=context
                    ),
                    tasks=tasks,
                    task_manager=manager,
                    num_fewshot=shots,
                    limit=limit,
                    bootstrap_iters=1000,  # only switches standard errors on; those of means are exact
                    log_samples=False,
                    confirm_run_unsafe_code=run_code,
                    metadata=metadata,
                )
        except Exception as error:  # data sets, hub and tasks each raise their own
            if name == RULER and isinstance(error, ZeroDivisionError):  # its way of saying that no word fits
                raise ValueError(
                    f"ruler's word lists do not fit into {min(lengths)} tokens of this tokenizer; use longer --lengths"
                ) from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{name} failed in lm-evaluation-harness ({reason})") from error
    return [
        BenchmarkScore(task, metric, *numbers, shots, shots_from)
        for (task, metric), numbers in _averages(shown, found).items()
        if name != RULER or metric in map(str, lengths)
    ]


def _local_tasks(name: str, local: Path, known: Container[str]) -> tuple[list[dict[str, Any]], str]:
    """The harness's tasks with their items read from local files, and the split that examples come from."""
    benchmark = BENCHMARKS[name]
    tasks, shots_from = [], benchmark.shot_split
    for task, path in local_files(name, local).items():
        if task not in known:
            raise ValueError(f"lm-evaluation-harness has no task {task!r}; name local files after its tasks")
        files, changes = {benchmark.split: str(path.resolve())}, {}
        shot_path = local / f"{task}_{benchmark.shot_split}.jsonl"
        if benchmark.shot_split and shot_path.exists():
            files[benchmark.shot_split] = str(shot_path.resolve())
        elif benchmark.shot_split:
            shots_from = benchmark.split
            # The harness keeps an item out of its own examples only if their split is the test split or not given.
            changes = {"training_split": None, "fewshot_split": "test" if benchmark.split == "test" else None}
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        tasks.append({"task": task, **source, **changes})
    return tasks, shots_from


def local_files(name: str, folder: Path) -> dict[str, Path]:
    """The files of a benchmark's tasks, by the harness's name of the task.

    Raises:
        ValueError: if there is none, or one is empty.
    """
    benchmark = BENCHMARKS[name]
    end = f"_{benchmark.split}.jsonl"
    whole = folder / f"{benchmark.harness}{end}"
    found = [whole] if whole.exists() else sorted(folder.glob(f"{benchmark.harness}_*{end}"))
    if not found:
        raise ValueError(f"{folder} has no {whole.name} or {benchmark.harness}_*{end}; give another folder")
    for path in found:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; give items, one JSON object per line")
    return {path.name.removesuffix(end): path for path in found}


def _averages(
    tasks: Mapping[str, str], found: Mapping[str, Any]
) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    """Value, standard error and number of items by task and metric.

    Local tasks of one group are averaged over their items, as the harness does.
    """
    gathered: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for task, shown in tasks.items():
        rows = found["results"].get(task) or found["groups"][task]
        for key, value in rows.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = rows.get(f"{metric}_stderr,{chosen}")
            known = float(error) if isinstance(error, int | float) else nan
            label = metric if chosen == "none" else f"{metric}, {chosen}"
            gathered.setdefault((shown, label), []).append((float(value), known, _num_samples(task, found)))
    averages = {}
    for place, parts in gathered.items():
        total = sum(count for _, _, count in parts)
        value = sum(part * count for part, _, count in parts) / total
        error = sqrt(sum((one * count) ** 2 for _, one, count in parts)) / total
        averages[place] = value, None if isnan(error) else error, total
    return averages


def _num_samples(task: str, found: Mapping[str, Any]) -> int:
    """Scored items of a task; for a group, those of its leaves."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_num_samples(child, found) for child in found["group_subtasks"][task])


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the harness's progress bars and log lines; its failures are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    kept = os.dup(2)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # the harness runs git, which writes to file descriptor 2
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logger.setLevel(level)
