"""Trainers of trl on a saved folder, as its command line calls them: by path."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from gated_attention.models import GatedQwen3Config, GatedQwen3ForCausalLM
from gated_attention.spec import GateSpec

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # trl's own

WORDS = ["<pad>", "<eos>", *"abcdefgh"]


@pytest.fixture
def folder(tmp_path):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = GatedQwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, gates=GateSpec(granularity="headwise"),
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GatedQwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options(kind, folder):
    return kind(
        output_dir=str(folder.parent / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, learning_rate=0.01, gradient_checkpointing=False,
    )  # fmt: skip


def is_moved(model, folder):
    before = GatedQwen3ForCausalLM.from_pretrained(folder).model.layers[0].self_attn.g_proj.weight
    return not torch.equal(before, model.model.layers[0].self_attn.g_proj.weight)


def test_supervised_fine_tuning_takes_a_path(folder):
    texts = Dataset.from_dict({"text": ["a b c d e", "b c d", "c d e f g", "a h"] * 2})
    trainer = trl.SFTTrainer(str(folder), args=options(trl.SFTConfig, folder), train_dataset=texts)
    trainer.train()
    assert trainer.state.global_step == 2
    assert is_moved(trainer.model, folder)


def test_direct_preference_optimisation_makes_its_own_reference(folder):
    pairs = Dataset.from_dict({"prompt": ["a b", "c d"], "chosen": [" c d", " e f"], "rejected": [" h", " a"]})
    trainer = trl.DPOTrainer(str(folder), args=options(trl.DPOConfig, folder), train_dataset=pairs)
    trainer.train()
    assert is_moved(trainer.model, folder)


def test_a_reward_model_takes_a_path(folder):
    pairs = Dataset.from_dict({"chosen": ["a b c d", "c d e f"], "rejected": ["a b h", "c d a"]})
    trainer = trl.RewardTrainer(str(folder), args=options(trl.RewardConfig, folder), train_dataset=pairs)
    trainer.train()
    assert is_moved(trainer.model, folder)
    trainer.save_model(str(folder.parent / "reward"))
    assert AutoConfig.from_pretrained(folder.parent / "reward").architectures == ["GatedQwen3ForSequenceClassification"]
