"""Ten small gated models with random weights, and what this package says of them: the reference for every server."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gated_attention.models import GatedQwen3Config, GatedQwen3MoeConfig
from gated_attention.spec import GateSpec
from gated_attention.train.text.tokenizer import load_tokenizer

VOCAB, NUM_NEW = 512, 16
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "head_dim": 64, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

MODELS = {
    f"{'moe' if moe else 'dense'} {granularity} group {group} {'tied' if tied else 'untied'}": (
        moe, granularity, group, tied
    )
    for moe, granularity, group, tied in (
        (False, "elementwise", 1, False), (False, "elementwise", 2, True), (False, "elementwise", 4, False),
        (False, "headwise", 1, True), (False, "headwise", 2, False), (False, "headwise", 4, True),
        (True, "elementwise", 1, True), (True, "elementwise", 4, False),
        (True, "headwise", 2, False), (True, "headwise", 4, True),
    )
}  # fmt: skip
"""By name: mixture of experts, granularity, queries per key/value head, whether the head is the embedding."""

PROMPTS = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (7, 33, 70)
]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte pairs of this file's own text; llama.cpp loads no tokenizer without merges."""
    text = Path(__file__).read_text(encoding="utf-8")
    return load_tokenizer("bpe-300", Dataset.from_dict({"text": [text]}))


def write_model(name: str, folder: Path) -> PreTrainedModel:
    """Save one of `MODELS` with a tokenizer; its weights keep activations of order one, so that logits vary."""
    moe, granularity, group, tied = MODELS[name]
    sizes = _SIZES | {"num_key_value_heads": 4 // group, "tie_word_embeddings": tied}
    gate = GateSpec(granularity=granularity)
    config = GatedQwen3MoeConfig(**sizes, **_EXPERTS, gates=gate) if moe else GatedQwen3Config(**sizes, gates=gate)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    with torch.no_grad():
        for part, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if part.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def reference(model: PreTrainedModel) -> tuple[list[np.ndarray], list[list[int]]]:
    """Log-probabilities (T, V) of every token after each of the prompt's, and greedy continuations; all in float32."""
    log_probabilities, greedy = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        log_probabilities.append(model(ids).logits[0].log_softmax(-1).numpy())
        for _ in range(NUM_NEW):  # without a cache, which is not what is tested
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        greedy.append(ids[0, len(prompt) :].tolist())
    return log_probabilities, greedy
