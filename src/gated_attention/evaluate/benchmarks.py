"""Benchmarks through lm-evaluation-harness, their items from the hub or from local files."""

import copy
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from math import sqrt
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as it is run.

    Attributes:
        harness: What the harness calls it.
        folder: Where among the harness's tasks it is defined; indexing all of them takes seconds.
        shots: Examples in the prompt. The paper gives none; these are what its base models are usually reported with.
        split: Whose items are scored.
        shot_split: Whose items are the examples; empty where there are none.
    """

    harness: str
    folder: str
    shots: int
    split: str
    shot_split: str = ""


BENCHMARKS: dict[str, Benchmark] = {
    "hellaswag": Benchmark("hellaswag", "hellaswag", 10, "validation", "train"),
    "mmlu": Benchmark("mmlu", "mmlu/default", 5, "test", "dev"),
    "gsm8k": Benchmark("gsm8k", "gsm8k", 5, "test", "train"),
    "humaneval": Benchmark("humaneval", "humaneval", 0, "test"),
    "ceval": Benchmark("ceval-valid", "ceval", 5, "val", "dev"),
    "cmmlu": Benchmark("cmmlu", "cmmlu", 5, "test", "dev"),
}
"""Table 1's, and HumanEval and CMMLU, which the paper names beside them."""

RULER = "ruler"
RULER_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that need no download: their haystacks are repeated sentences, needles, or words."""

_SUBWORD = 0.7  # tokens per character from which RULER's generators no longer end
_ENGLISH = "The special magic number hidden in this sentence is written in plain English words."


@dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """One metric of one task.

    Attributes:
        task: `hellaswag`, or `ruler niah_single_1` and so on.
        metric: As the harness names it, e.g. `acc_norm` or `exact_match, flexible-extract`; RULER's are lengths.
        value: Mostly a share, 0 to 1.
        standard_error: As the harness gives it, without bootstrap; None where it gives none.
        shots: Examples in the prompt.
        shots_from: The split they come from; where it is the scored one, an item is never among its own examples.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    num_samples: int
    shots: int
    shots_from: str


def require_harness() -> None:
    """Refuse benchmarks where the harness is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("benchmarks need lm-evaluation-harness; pip install 'gated-attention[evaluate]'")


def require_subword(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer near to single characters, with which RULER's generators never end.

    Raises:
        ValueError: if it is one.
    """
    share = len(tokenizer.encode(_ENGLISH, add_special_tokens=False)) / len(_ENGLISH)
    if share > _SUBWORD:
        raise ValueError(
            f"ruler needs a sub-word tokenizer; this one makes {share:.2f} tokens per character of English"
        )


def check_benchmark(tokenizer: PreTrainedTokenizerBase, name: str, *, local: Path | None, run_code: bool) -> None:
    """Refuse what can be refused before a model reads; arguments as those of `run_benchmark`.

    Raises:
        ValueError: if the harness or a file is missing, the tokenizer does not suit, or code may not run.
    """
    require_harness()
    if name == "humaneval" and not run_code:
        raise ValueError("humaneval runs the program text that the model writes; allow it with --run-code")
    if name == RULER:
        require_subword(tokenizer)
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
    """The scores of one benchmark.

    Args:
        name: Of `BENCHMARKS`, or `ruler`.
        context: Longest prompt; what is longer loses its beginning.
        shots: None is the benchmark's usual number.
        limit: Items of each task at most.
        local: A folder with `<task>_<split>.jsonl` in the data sets' own fields, e.g. `gsm8k_test.jsonl` or
            `mmlu_anatomy_test.jsonl`; None reads the hub. Without a file of `shot_split`, examples come from the
            scored file.
        lengths: RULER's, in tokens.
        run_code: HumanEval runs what the model writes; this allows it.

    Raises:
        ValueError: if the harness is missing, a file is, the tokenizer does not suit, or the harness fails.
    """
    check_benchmark(tokenizer, name, local=local, run_code=run_code)
    with tempfile.TemporaryDirectory() as folder:
        tasks, shots_from = _tasks(name, local, Path(folder))
        usual = 0 if name == RULER else BENCHMARKS[name].shots
        shots = usual if shots is None else shots
        metadata: dict[str, Any] = {}
        if name == RULER:
            tokenizer.save_pretrained(Path(folder) / "tokenizer")  # the harness loads it by path
            metadata = {"tokenizer": str(Path(folder) / "tokenizer"), "max_seq_lengths": list(lengths)}
        found = _simple_evaluate(
            model, tokenizer, list(tasks), Path(folder) if local else _stock_folder(name), metadata,
            context=context, batch_size=batch_size, shots=shots, limit=limit, run_code=run_code, name=name,
        )  # fmt: skip
    return _scores(name, tasks, found, shots, shots_from, {str(length) for length in lengths})


def _tasks(name: str, local: Path | None, folder: Path) -> tuple[dict[str, str], str]:
    """The harness's tasks, each with the name its scores go under, and where examples come from."""
    if name == RULER:
        return {task: f"{RULER} {task}" for task in RULER_TASKS}, ""
    benchmark = BENCHMARKS[name]
    if local is None:
        return {benchmark.harness: name}, benchmark.shot_split
    paths = local_files(name, local)
    shots_from = benchmark.shot_split
    for task, path in paths.items():
        shot_path = local / f"{task}_{benchmark.shot_split}.jsonl"
        own = bool(benchmark.shot_split) and not shot_path.exists()
        shots_from = benchmark.split if own else shots_from
        files = {benchmark.split: str(path.resolve())}
        files |= {} if own or not benchmark.shot_split else {benchmark.shot_split: str(shot_path.resolve())}
        content = {
            "include": str(_stock_yaml(name, task)),
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        if own:  # an item is kept out of its own examples only if their split is the test split, or neither is given
            content |= {"training_split": None}
            content |= {"fewshot_split": "test" if benchmark.split == "test" else None}
        (folder / f"local_{task}.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return {f"local_{task}": name for task in paths}, shots_from


def local_files(name: str, folder: Path) -> dict[str, Path]:
    """The files of a benchmark's tasks, by the harness's name of the task.

    Raises:
        ValueError: if there is none, or one is empty.
    """
    benchmark = BENCHMARKS[name]
    end = f"_{benchmark.split}.jsonl"
    whole = [folder / f"{benchmark.harness}{end}"]
    found = [path for path in whole if path.exists()] or sorted(folder.glob(f"{benchmark.harness}_*{end}"))
    if not found:
        raise ValueError(f"{folder} has no {benchmark.harness}{end} or {benchmark.harness}_*{end}; give another folder")
    for path in found:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; give items, one JSON object a line")
    return {path.name.removesuffix(end): path for path in found}


def _stock_yaml(name: str, task: str) -> Path:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(_stock_folder(name)), include_defaults=False)
    entry = manager.task_index.get(task)
    if entry is None or entry.yaml_path is None:
        raise ValueError(f"lm-evaluation-harness has no task {task!r}; name local files after its tasks")
    return Path(entry.yaml_path)


def _stock_folder(name: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / (RULER if name == RULER else BENCHMARKS[name].folder)


def _simple_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    include: Path,
    metadata: dict[str, Any],
    *,
    context: int,
    batch_size: int,
    shots: int,
    limit: int | None,
    run_code: bool,
    name: str,
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        with _silence(), _code_allowed(run_code):
            harness_model = HFLM(  # a copy of the tokenizer: the harness gives it a padding token
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=context
            )
            found = simple_evaluate(
                model=harness_model,
                tasks=tasks,
                task_manager=TaskManager(include_path=str(include), include_defaults=False, metadata=metadata or None),
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=1000,  # only switches standard errors on; those of means are exact
                log_samples=False,
                confirm_run_unsafe_code=run_code,
                metadata=metadata or None,
            )
    except Exception as error:  # data sets, hub and tasks each raise their own
        if name == RULER and isinstance(error, ZeroDivisionError):  # its way of saying that no word fits
            shortest = min(metadata["max_seq_lengths"])
            raise ValueError(
                f"ruler's word lists do not fit into {shortest} tokens of this tokenizer; use longer --lengths"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name} failed in lm-evaluation-harness ({reason})") from error
    return dict(found)


def _scores(
    name: str,
    tasks: Mapping[str, str],
    found: Mapping[str, Any],
    shots: int,
    shots_from: str,
    lengths: set[str],
) -> list[BenchmarkScore]:
    """The harness's numbers; local tasks of one group are averaged over their items, as the harness does."""
    gathered: dict[tuple[str, str], list[tuple[float, float | None, int]]] = {}
    for task, shown in tasks.items():
        rows = found["results"].get(task) or found["groups"][task]
        count = _num_samples(task, found)
        for key, value in rows.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or (name == RULER and metric not in lengths):
                continue
            error = rows.get(f"{metric}_stderr,{chosen}")
            label = metric if chosen == "none" else f"{metric}, {chosen}"
            known = float(error) if isinstance(error, int | float) else None
            gathered.setdefault((shown, label), []).append((float(value), known, count))
    scores = []
    for (shown, label), parts in gathered.items():
        total = sum(count for _, _, count in parts)
        value = sum(part * count for part, _, count in parts) / total
        errors = [error for _, error, _ in parts if error is not None]
        combined = sqrt(sum((e * n) ** 2 for _, e, n in parts if e is not None)) / total
        scores.append(
            BenchmarkScore(
                shown, label, value, combined if len(errors) == len(parts) else None, total, shots, shots_from
            )
        )
    return scores


def _num_samples(task: str, found: Mapping[str, Any]) -> int:
    """Items that were scored; a group's are those of its leaves."""
    counts, subtasks = found["n-samples"], found.get("group_subtasks", {})
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_num_samples(child, found) for child in subtasks[task])


@contextmanager
def _silence() -> Iterator[None]:
    """The harness's progress bars and log lines kept back; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    kept = os.dup(2)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # the harness asks git for a commit, and git complains by itself
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logger.setLevel(level)


@contextmanager
def _code_allowed(run_code: bool) -> Iterator[None]:
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # HumanEval's metric asks for it
    try:
        yield
    finally:
        if run_code:
            os.environ.pop("HF_ALLOW_CODE_EVAL") if before is None else os.environ.update(HF_ALLOW_CODE_EVAL=before)
