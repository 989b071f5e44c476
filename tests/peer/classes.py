"""The test classes of transformers on our models, and on plain Qwen3 and Qwen3-MoE as control; see run.py."""

import unittest
from typing import Any
from unittest import mock

import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers_tests import (
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_modeling_common,
    test_tensor_parallel_mixin,
)
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from gated_attention import GateSpec, models

# They run for the model types that they list alone, which ours cannot be among.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None


class Inputs:
    """Small models and inputs, as every test class of transformers asks its own tester for."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4
    num_labels, num_choices = 3, 4

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.config_class = parent.config_class
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class = parent.all_model_classes[:3]

    def get_config(self) -> Any:
        return self.config_class(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=37, head_dim=8,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **self.parent.options,
        )  # fmt: skip

    def prepare_config_and_inputs(self) -> tuple[Any, torch.Tensor, torch.Tensor]:
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), ids_tensor(shape, self.vocab_size), random_attention_mask(shape)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config, ids, mask = self.prepare_config_and_inputs()
        return config, {"input_ids": ids, "attention_mask": mask}


class Common(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
):
    """Everything that transformers' sdist holds for a language model."""

    model_tester: Any = None
    test_can_init_all_missing_weights_before_2023 = True  # a file's year is read from its header, which ours lack
    options: dict[str, Any] = {}  # noqa: RUF012
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = Inputs(self)

    def test_config(self) -> None:
        ConfigTester(self, config_class=self.config_class, hidden_size=37).run_common_tests()


PLAIN = (
    Qwen3Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3ForQuestionAnswering,
)
PLAIN_MOE = (
    Qwen3MoeModel,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeForQuestionAnswering,
)
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# The tests look up here, by the name of a class, which labels it takes; the Auto classes' `register` does not enter it.
for table, head in zip(
    (
        "MODEL",
        *(
            f"MODEL_FOR_{of}"
            for of in ("CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
        ),
    ),
    HEADS,
    strict=True,
):
    names = getattr(test_modeling_common, f"{table}_MAPPING_NAMES")
    ours = {"gated_qwen3": f"GatedQwen3{head}", "gated_qwen3_moe": f"GatedQwen3Moe{head}"}
    setattr(test_modeling_common, f"{table}_MAPPING_NAMES", {**names, **ours})


class DenseControl(Common, unittest.TestCase):
    config_class, all_model_classes = Qwen3Config, PLAIN


class DenseHeadwise(Common, unittest.TestCase):
    config_class = models.GatedQwen3Config
    all_model_classes = tuple(getattr(models, f"GatedQwen3{head}") for head in HEADS)
    options = {"gates": GateSpec(granularity="headwise")}  # noqa: RUF012


class DenseSites(DenseHeadwise):
    options = {"gates": tuple(GateSpec(site) for site in ("sdpa", "value", "key", "query", "output"))}  # noqa: RUF012


class MoeControl(Common, unittest.TestCase):
    config_class, all_model_classes, options = Qwen3MoeConfig, PLAIN_MOE, Common.experts


class MoeElementwise(Common, unittest.TestCase):
    config_class = models.GatedQwen3MoeConfig
    all_model_classes = tuple(getattr(models, f"GatedQwen3Moe{head}") for head in HEADS)
    options = {**Common.experts, "gates": GateSpec()}  # noqa: RUF012

    def test_moe_models_record_router_logits(self) -> None:
        # It looks for experts in the source of the module, where ours are inherited.
        with mock.patch.object(test_modeling_common.inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()
