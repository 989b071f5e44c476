"""The kernels for Hopper, compiled without a GPU: nothing spills, nothing is serialised, everything fits."""

import re

import pytest
from ptxas_log import listening, spilled

triton = pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
# Bytes of stores and loads in the code. From Triton 3.8 on, and more with its ptxas 13 from 3.9 on, some of what a tile
# of rows or a mask needs is spilled, none of it in the loop over whole tiles of keys.
SPILLED = 0 if triton.__version__.startswith(("3.6.", "3.7.")) else 16 if triton.__version__.startswith("3.8.") else 800
CASES = [(d, causal, channels) for d in (64, 128, 256) for causal in (False, True) for channels in (False, True)]
CASES.remove((256, False, True))  # not offered
FORWARD = [
    pytest.param(*case, keys, marks=[] if case[:2] == (128, True) and keys == 1024 else pytest.mark.trust)
    for case in CASES for keys in (1024, 65_536)
]  # fmt: skip


def assemble(kernel, signature, constants, num_warps=4, aligned=()):
    """The compiled kernel and what ptxas says of it."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from gated_attention.ops.launch import FUSION

    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind[0] == "*" or name in aligned
        },
    )
    with listening() as said:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps} | FUSION)
    return compiled, said.getvalue()


def described(rows, head_dim, dtype="bf16"):
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, head_dim]
    element = {"bf16": gl.bfloat16, "fp32": gl.float32}[dtype]
    return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"


def assert_fast(compiled, said, registers="240"):
    """A spill, or products in series for want of registers, halves the speed and shows nowhere else."""
    assert sum(spilled(said)) <= SPILLED, said
    assert "C7512" not in said
    assert "serializ" not in said
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert registers in set(re.findall(r"setmaxnreg\.inc\S*\s+(\d+)", compiled.asm["ptx"]))


@pytest.mark.parametrize(("head_dim", "causal", "channels", "num_keys"), FORWARD)
def test_forward_neither_spills_nor_serialises(head_dim, causal, channels, num_keys):
    from gated_attention.ops.hopper import forward as hopper_forward
    from gated_attention.ops.hopper import forward_launch as hopper_forward_launch

    blocks = hopper_forward_launch.CUTS[head_dim].blocks(num_keys, causal)
    queries, keys = described(64, head_dim), described(blocks.num_keys, head_dim)
    signature = {"q_desc": queries, "k_desc": keys, "v_desc": keys, "o_desc": queries, "s_desc": queries}
    signature |= {"s_ptr": "*bf16", "lse_ptr": "*fp32", "counter_ptr": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(("B", "H", "T", "S", "group", "section", "num_tiles", "ss_b", "ss_t", "ss_h"), "i32")
    constants = {"BN": blocks.num_keys, "D": head_dim, "STAGES": blocks.num_stages}
    constants |= {"QUERY_STAGES": blocks.num_query_stages, "OUTPUT_IN_QUERIES": blocks.output_in_queries}
    constants |= {"CAUSAL": causal, "ELEMENTWISE": channels, "CONSUMERS": blocks.num_consumers}
    registers = {2: "240", 3: "160"}[blocks.num_consumers]
    assert_fast(*assemble(hopper_forward.forward_kernel, signature, constants), registers)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_neither_spills_nor_serialises(head_dim, causal):
    from triton.experimental.gluon import language as gl

    from gated_attention.ops.hopper import backward as hopper_backward
    from gated_attention.ops.hopper import backward_launch as hopper_backward_launch

    num_queries = hopper_backward_launch.NUM_QUERIES[head_dim]
    num_keys, num_stages = hopper_backward_launch.NUM_KEYS, hopper_backward_launch.NUM_STAGES
    queries, keys = described(num_queries, head_dim), described(num_keys, head_dim)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    strides = ("dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t")
    signature = {"q_desc": queries, "k_desc": keys, "v_desc": keys, "do_desc": queries}
    signature |= {"stats_desc": f"tensordesc<fp32[{num_queries}],{flat!r}>"}
    signature |= {"dq_desc": described(num_queries, head_dim, "fp32"), "dk_ptr": "*bf16", "dv_ptr": "*bf16"}
    signature |= dict.fromkeys((*strides, "B", "K", "T", "S", "T_padded", "group", "section"), "i32")
    signature |= {"scale": "fp32"}
    constants = {"BM": num_queries, "BN": num_keys, "D": head_dim, "STAGES": num_stages, "CAUSAL": causal}
    warps = hopper_backward.COMPUTE_WARPS
    compiled, said = assemble(hopper_backward.backward_kernel, signature, constants, warps, strides)
    assert_fast(compiled, said)
    assert "cp.reduce.async.bulk.tensor.4d" in compiled.asm["ptx"]


SKIP = [(d, causal, group, True) for d in (64, 128) for causal in (True, False) for group in (1, 4)]
SKIP += [(d, True, group, hard) for d in (64, 128) for group, hard in ((8, True), (4, False), (3, True))]


@pytest.mark.parametrize(
    ("head_dim", "causal", "group", "hard"),
    [pytest.param(*case, marks=[] if case == (128, True, 4, True) else pytest.mark.trust) for case in SKIP],
)
def test_forward_that_skips_neither_spills_nor_serialises(head_dim, causal, group, hard):
    from gated_attention.ops.hopper import skip_forward, skip_forward_launch

    blocks = skip_forward_launch.choose_blocks(head_dim, causal)
    keys = described(blocks.num_keys, head_dim)
    signature = {"q_ptr": "*bf16", "k_desc": keys, "v_desc": keys, "out_ptr": "*bf16", "s_ptr": "*bf16"}
    signature |= dict.fromkeys(("order_ptr", "counts_ptr", "work_ptr", "counter_ptr"), "*i32")
    signature |= {"lse_ptr": "*fp32", "scale": "fp32"}
    strides = ("q_b", "q_h", "q_t", "o_b", "o_h", "o_t")
    signature |= dict.fromkeys((*strides, "ss_t", "ss_h"), "i32") | dict.fromkeys(("q_b", "o_b", "ss_b"), "i64")
    signature |= dict.fromkeys(("num_heads", "K", "T", "S", "offset", "capacity"), "i32")
    constants = {"BN": blocks.num_keys, "D": head_dim, "G": group, "STAGES": blocks.num_stages}
    constants |= {"QUERY_STAGES": blocks.num_query_stages, "OUTPUT_IN_QUERIES": blocks.output_in_queries}
    constants |= {"CAUSAL": causal, "HARD": hard, "CONSUMERS": blocks.num_consumers}
    compiled, said = assemble(skip_forward.skip_forward_kernel, signature, constants, aligned=strides)
    assert_fast(compiled, said, {2: "240", 3: "160"}[blocks.num_consumers])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", compiled.asm["ptx"])
    assert copies
    assert set(copies) == {"0x10"}  # bytes; strides of q are known to be multiples of 16
