"""Benchmarks from local files against the harness called by hand, without network."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from gated_attention.evaluate import benchmarks
from gated_attention.evaluate.benchmarks import BENCHMARKS, BenchmarkScore, local_files, run_benchmark
from gated_attention.train.text.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the harness and what it imports warn on every call
]
CONTEXT = 384


@pytest.fixture(scope="module")
def tokenizer():
    text = "".join(Path(path).read_text(encoding="utf-8") for path in (json.__file__, json.decoder.__file__))
    return load_tokenizer("bpe-600", Dataset.from_dict({"text": [text]}))


@pytest.fixture
def model(tokenizer):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "items"
    folder.mkdir()
    write(folder / "hellaswag_validation.jsonl", [
        {"ind": i, "activity_label": "Counting", "ctx_a": f"A man counts to {i}. he", "ctx_b": "", "ctx": f"A man {i}",
         "endings": [f"stops at {j}." for j in range(i, i + 4)], "label": str(i % 4), "split": "val", "source_id": "0"}
        for i in range(14)
    ])  # fmt: skip
    questions = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(6)]
    write(folder / "gsm8k_test.jsonl", questions)
    for subject, n in (("anatomy", 3), ("astronomy", 6)):
        rows = [
            {"question": f"{subject} {i}?", "choices": [f"{i}", "b", "c", "d"], "answer": i % 4} for i in range(n + 5)
        ]
        write(folder / f"mmlu_{subject}_test.jsonl", rows[5:])
        write(folder / f"mmlu_{subject}_dev.jsonl", rows[:5])
    return folder


def by_hand(model, tokenizer, name, data_files, tmp_path, changes, shots, limit=None):
    """The harness called as its documentation says, with a task file written here."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    stock = Path(lm_eval.__file__).parent / "tasks" / changes.pop("stock")
    folder = tmp_path / "tasks"
    folder.mkdir(exist_ok=True)
    task = {"include": str(stock), "task": "mine", "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files}, **changes}  # fmt: skip
    (folder / "mine.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT),
        tasks=["mine"], task_manager=TaskManager(include_path=str(folder), include_defaults=False), num_fewshot=shots,
        limit=limit, bootstrap_iters=0,
    )  # fmt: skip
    return {
        key.replace(",none", "").replace(",", ", "): value
        for key, value in found["results"]["mine"].items()
        if "," in key and "stderr" not in key
    }


def run(model, tokenizer, name, local, **options):
    return run_benchmark(model, tokenizer, name, context=CONTEXT, batch_size=3, local=local, **options)


def test_hellaswag_scores_equal_the_harness_called_by_hand(model, tokenizer, local, tmp_path):
    scores = run(model, tokenizer, "hellaswag", local, shots=2)
    files = {"validation": str(local / "hellaswag_validation.jsonl")}
    changes = {"stock": "hellaswag/hellaswag.yaml", "training_split": None}
    expected = by_hand(model, tokenizer, "hellaswag", files, tmp_path, changes, shots=2)
    assert {score.metric: score.value for score in scores} == expected
    assert {score.metric for score in scores} == {"acc", "acc_norm"}
    assert all((s.task, s.num_samples, s.shots, s.shots_from) == ("hellaswag", 14, 2, "validation") for s in scores)
    assert all(score.standard_error > 0 for score in scores)


def test_gsm8k_reports_strict_and_flexible_matches(model, tokenizer, local, tmp_path):
    scores = run(model, tokenizer, "gsm8k", local, shots=0, limit=2)
    files = {"test": str(local / "gsm8k_test.jsonl")}
    changes = {"stock": "gsm8k/gsm8k.yaml", "training_split": None, "fewshot_split": "test"}
    expected = by_hand(model, tokenizer, "gsm8k", files, tmp_path, changes, shots=0, limit=2)
    assert {score.metric: score.value for score in scores} == expected
    assert {score.metric for score in scores} == {"exact_match, strict-match", "exact_match, flexible-extract"}
    assert {score.num_samples for score in scores} == {2}


def test_subjects_of_a_group_are_averaged_over_their_items(model, tokenizer, local, tmp_path):
    (score,) = run(model, tokenizer, "mmlu", local)
    total = 0.0
    for subject, n in (("anatomy", 3), ("astronomy", 6)):
        files = {split: str(local / f"mmlu_{subject}_{split}.jsonl") for split in ("test", "dev")}
        changes = {"stock": f"mmlu/default/mmlu_{subject}.yaml"}
        total += n * by_hand(model, tokenizer, "mmlu", files, tmp_path, changes, shots=5)["acc"]
    assert score.value == pytest.approx(total / 9)
    assert (score.num_samples, score.shots, score.shots_from) == (9, 5, "dev")


@pytest.mark.parametrize("folder", [False, True])
def test_ruler_numbers_come_out_by_length_whatever_the_others_read(monkeypatch, model, tokenizer, local, folder):
    seen = {}

    def evaluate(tasks, task_manager, metadata, **options):
        assert Path(metadata["tokenizer"], "tokenizer_config.json").exists()
        assert set(tasks) <= set(task_manager.task_index)
        seen.update(metadata, tasks=tasks, **options)
        rows = {task: {"alias": task, "128,none": 0.5, "128_stderr,none": "N/A", "4096,none": -1} for task in tasks}
        return {"results": rows, "n-samples": {task: {"effective": 7} for task in tasks}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    options = {"context": CONTEXT, "batch_size": 1, "lengths": [128], "limit": 7, "local": local if folder else None}
    scores = run_benchmark(model, tokenizer, "ruler", **options)
    assert seen["max_seq_lengths"] == [128]
    assert (seen["tasks"], seen["limit"], seen["num_fewshot"]) == (list(benchmarks.RULER_TASKS), 7, 0)
    assert scores[0] == BenchmarkScore("ruler niah_single_1", "128", 0.5, None, 7, 0, "")
    assert len(scores) == 6


def test_what_cannot_run_is_refused(monkeypatch, model, tokenizer, local, tmp_path):
    with pytest.raises(ValueError, match=r"has no gsm8k_test\.jsonl or gsm8k_\*_test\.jsonl; give another folder"):
        local_files("gsm8k", tmp_path)
    (local / "gsm8k_test.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"gsm8k_test\.jsonl is empty"):
        local_files("gsm8k", local)
    with pytest.raises(ValueError, match=r"humaneval runs the program text .* allow it with --run-code"):
        run(model, tokenizer, "humaneval", local)
    with pytest.raises(ValueError, match=r"ruler needs a sub-word tokenizer; this one makes 1\.00 tokens"):
        run(model, load_tokenizer("bytes"), "ruler", None, lengths=[128])
    with pytest.raises(ValueError, match=r"ruler failed .*Could not generate any sample .* at max_seq_length=128"):
        run(model, tokenizer, "ruler", None, lengths=[128])

    def divide(**_):
        raise ZeroDivisionError  # what common_words_extraction does at 1024 tokens of a small vocabulary

    monkeypatch.setattr(lm_eval, "simple_evaluate", divide)
    with pytest.raises(ValueError, match=r"ruler's word lists do not fit into 1024 tokens .* use longer --lengths"):
        run(model, tokenizer, "ruler", None, lengths=[2048, 1024])
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"benchmarks need lm-evaluation-harness; pip install 'gated-attention\[eval"):
        run(model, tokenizer, "gsm8k", local)


def test_local_files_carry_the_harness_names(local):
    assert list(local_files("mmlu", local)) == ["mmlu_anatomy", "mmlu_astronomy"]
    assert BENCHMARKS["ceval"].harness == "ceval-valid"
