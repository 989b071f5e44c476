"""Pipelines of transformers on saved folders, by path; their own tests are not in transformers' sdist."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from gated_attention import models
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenizer import load_tokenizer

WIDTHS = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2,
    "id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1},
}  # fmt: skip
TASKS = {
    "text-generation": ("ForCausalLM", {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}),
    "text-classification": ("ForSequenceClassification", {"top_k": None}),
    "zero-shot-classification": ("ForSequenceClassification", {"candidate_labels": ["sky", "sea"]}),
    "token-classification": ("ForTokenClassification", {"ignore_labels": []}),
    "feature-extraction": ("Model", {}),
}
TEXTS = ["a gate per head", "one"]


def numbers(found):
    """All numbers in an answer, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [number for one in found for number in numbers(one)]
    return [] if isinstance(found, str) else [float(found)]


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_answers_in_a_batch_as_one_by_one(task, tmp_path):
    head, options = TASKS[task]
    tokenizer = load_tokenizer("bytes")
    tokenizer.pad_token = tokenizer.eos_token
    config = models.GatedQwen3Config(
        **WIDTHS, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=None,
        gates=GateSpec(granularity="headwise"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(models, f"GatedQwen3{head}")(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answer = pipeline(task, str(tmp_path), device="cpu")
    assert type(answer.model) is type(model)
    alone = [answer(text, **options) for text in TEXTS]
    together = answer(TEXTS, batch_size=2, **options)
    for one, other in zip(alone, together, strict=True):
        expected, found = numbers(one), numbers(other)
        assert expected
        is_padded_left = task == "text-generation"
        found = found[-len(expected) :] if is_padded_left else found[: len(expected)]  # padding is answered too
        np.testing.assert_allclose(found, expected, atol=1e-5)
