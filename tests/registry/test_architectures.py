"""What an architecture makes of a size, and what it refuses, before anything heavy is loaded."""

import re
import subprocess
import sys

import pytest

from gated_attention.registry.architectures import ARCHITECTURES, get_architecture
from gated_attention.registry.choices import choose_variants
from gated_attention.registry.variants import VARIANTS
from gated_attention.sizes import SIZES


@pytest.mark.parametrize(
    ("architecture", "names", "message"),
    [
        ("gpt5", ["baseline"], "unknown architecture 'gpt5'; choose from qwen3, qwen2, llama"),
        (
            "llama",
            ["switch-v-4-top-4"],
            "'switch-v-4-top-4' is switch v 4 top 4; architecture 'llama' carries gates only",
        ),
        ("llama", ["sandwich-norm-lr-8"], "is sandwich norm; architecture 'llama' carries gates only"),
        ("llama", ["learned-sink"], "'learned-sink' reads the log-sum-exp, which architecture 'llama' does not return"),
        ("llama", ["query-heads-x1.5"], "adds heads; those of architecture 'llama' fill its hidden size"),
        ("gpt_neox", ["kv-heads-x2"], "adds heads; those of architecture 'gpt_neox' fill its hidden size"),
    ],
)
def test_a_variant_that_a_family_cannot_carry_is_refused_by_name(architecture, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_variants(names, None, "tiny", architecture)


def test_a_mixture_of_experts_is_our_own():
    with pytest.raises(
        ValueError, match="size 'moe-tiny' is a mixture of experts, which only architecture 'qwen3' has"
    ):
        choose_variants(None, None, "moe-tiny", "llama")


def test_rows_of_a_table_that_a_family_cannot_carry_are_left_out_with_the_reason():
    chosen, left_out = choose_variants(None, 3, "tiny", "mistral")
    assert [variant.name for variant in chosen][:2] == ["baseline", "sdpa-elementwise"]
    assert [reason.split("'")[1] for reason in left_out] == ["heads-rms-norm", "heads-silu"]


def test_our_own_architecture_takes_sizes_and_variants_as_they_are():
    own = get_architecture("qwen3")
    assert all(own.fit(size) is size for size in SIZES.values())
    for variant in VARIANTS.values():
        own.check(variant)


def test_an_ffn_of_two_matrices_costs_as_much_and_heads_fill_the_hidden_size():
    for size in (size for size in SIZES.values() if not size.num_experts):
        fitted = ARCHITECTURES["gpt_neox"].fit(size)
        assert fitted.intermediate_size * 2 == size.intermediate_size * 3
        assert fitted.num_attention_heads * fitted.head_dim == fitted.hidden_size
        assert fitted.num_key_value_heads == fitted.num_attention_heads
        llama = ARCHITECTURES["llama"].fit(size)
        assert llama.num_attention_heads == 2 * llama.num_key_value_heads
        assert (llama.intermediate_size, llama.ffn_matrices) == (size.intermediate_size, 3)


def test_the_command_refuses_before_torch_is_loaded():
    code = (
        "import sys\nfrom gated_attention.cli import main\n"
        "sys.argv = ['gated-attention', 'compare', '--architecture', 'llama', '--variants', 'learned-sink']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.startswith("error: variant 'learned-sink' reads the log-sum-exp")
    assert len(done.stderr.splitlines()) == 1
