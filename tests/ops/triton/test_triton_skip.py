"""The portable kernels that skip closed gates: what they compute, in the interpreter, and how they compile."""

import pytest
import torch

pytest.importorskip("triton")

from absent import SHARED_MEMORY, SPILLED, assert_fast

from gated_attention.ops.triton import skip_backward, skip_forward, skip_rows, skip_work
from gated_attention.ops.triton.tiles import GATHERED_LARGE, GATHERED_LARGE_WITH_FIRST_KEYS, GATHERED_SMALL, heads

CUTS = {
    (80, False): GATHERED_SMALL,
    (80, True): GATHERED_SMALL,
    (90, False): GATHERED_LARGE,
    (90, True): GATHERED_LARGE_WITH_FIRST_KEYS,
}
KINDS = [(True, False), (True, True), (False, False)]  # causal, first keys
CASES = [(c, d, 4, *kind) for c in SHARED_MEMORY for d in (64, 128, 256) for kind in KINDS]
CASES += [(c, d, 4, True, True) for c in SHARED_MEMORY for d in (16, 32)]
CASES += [(c, d, group, True, False) for c in SHARED_MEMORY for d in (64, 128) for group in (1, 8)]
FIRST = (90, 128, 4, True, False)


def test_kernels_compute_the_definition(run_interpreted):
    run_interpreted("triton_skip_check.py")


@pytest.mark.trust
def test_kernels_compute_the_definition_in_150_more_random_cases(run_interpreted):
    run_interpreted("triton_skip_check.py", "150", "2")


def test_the_work_list_is_a_sort(run_interpreted):
    run_interpreted("skip_work_check.py")


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "causal", "first_keys"),
    [pytest.param(*case, marks=[] if case == FIRST else pytest.mark.trust) for case in CASES],
)
def test_nothing_spills_and_everything_fits(capability, head_dim, group, causal, first_keys, assemble):
    cut = CUTS[capability, first_keys][head_dim]
    x, logits = (heads(torch.empty(1, 2 * group, 64, channels, dtype=torch.bfloat16)) for channels in (head_dim, 1))
    rows, codes = torch.empty(1, 2, 64 * group), torch.empty(1, 2, 64 * group, dtype=torch.int32)
    first = torch.empty(1, 64, dtype=torch.int32) if first_keys else None
    options = {"G": group, "D": head_dim}
    sizes, masks = (64, 64, 2, 2, 0.1), {"CAUSAL": causal, "FIRST_KEYS": first_keys}
    for kernel, arguments, blocks in (
        (skip_forward.forward_kernel, (x, x, x, logits, first, x, rows, codes, codes), cut.forward),
        (skip_backward.keys_kernel, (x, x, x, x, rows, rows, first, codes, codes, first, x, x), cut.keys),
        (skip_backward.queries_kernel, (x, x, x, x, rows, rows, first, codes, codes, x), cut.queries),
    ):
        hard = {"HARD": causal} if blocks is cut.forward else {}
        compiled = assemble(capability, kernel, *arguments, *sizes, **options, **masks, **hard, **blocks.options())
        # 16 bytes per thread; with tiles of 64 keys, which spill none, the backward of larger groups was far slower.
        few = 16 if (capability, head_dim, group, blocks) == (90, 128, 1, cut.keys) else 0
        assert_fast(capability, *compiled, max(few, SPILLED))


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_what_comes_before_the_kernels_neither_spills(capability, assemble):
    x, one = (heads(torch.empty(1, 8, 64, channels, dtype=torch.bfloat16)) for channels in (128, 1))
    rows, codes = torch.empty(1, 2, 256), torch.empty(1, 2, 256, dtype=torch.int32)
    prepare = (x, x, one, codes, codes, rows, one, 64, 2)
    compiled = assemble(capability, skip_backward.prepare_kernel, *prepare, HARD=True, ROWS=16, G=4, D=128)
    assert_fast(capability, *compiled)
    logits = torch.empty(1, 64, 8, dtype=torch.bfloat16)
    working = (codes, codes, codes, 64, 64, 0, 2, 2)
    constants = {"BM": 128, "BN": 128, "CAUSAL": True, "RANKS": skip_work._RANKS, "HEADS": skip_work._HEADS}
    assert_fast(capability, *assemble(capability, skip_work.work_kernel, *working, G=4, **constants))
    listing = (logits, *logits.stride(), codes, codes, 64, 2, -3.0)
    assert_fast(capability, *assemble(capability, skip_rows.list_kernel, *listing, G=4, CHUNK=skip_rows._CHUNK))
