"""A kernel is compiled once for arguments alike, and launched again with whatever they are then."""

import pytest
import torch

from gated_attention.ops import launch as launching
from gated_attention.ops.launch import launch, launch_key


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands for a jitted kernel: launching it compiles, as Triton does for arguments it has not seen."""

    arg_names = ("x", "n", "A", "B")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def run(*args, num_warps, enable_fp_fusion, **constants):
            assert num_warps == 4
            assert enable_fp_fusion
            self.compiled.append(Compiled())
            self.compiled[-1].launches.append((grid, (*args, *constants.values())))
            return self.compiled[-1]

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "_compiled", {})
    kernel = Kernel()
    kernel.arg_names = list(kernel.arg_names)
    return kernel


def test_what_is_alike_is_compiled_once(kernel):
    launch(kernel, (1, 1, 1), "float16", 10, 2, A=16, B=True)
    launch(kernel, (3, 2, 1), "float16", 11, 5, A=16, B=True)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0].launches == [((1, 1, 1), (10, 2, 16, True)), ((3, 2, 1), (11, 5, 16, True))]


@pytest.mark.parametrize(("like", "a"), [("bfloat16", 16), ("float16", 32)])
def test_what_differs_is_compiled_anew(like, a, kernel):
    launch(kernel, (1, 1, 1), "float16", 10, 2, A=16, B=True)
    launch(kernel, (1, 1, 1), like, 10, 2, A=a, B=True)
    assert len(kernel.compiled) == 2


def test_constants_out_of_order_are_refused(kernel):
    with pytest.raises(AssertionError, match="in order"):
        launch(kernel, (1, 1, 1), "float16", 10, 2, B=True, A=16)


def test_alignment_of_each_first_number_tells_tensors_apart():
    x = torch.zeros(64, dtype=torch.bfloat16)
    offset = -x.data_ptr() % 16 // 2
    aligned, also_aligned, unaligned = (x[offset + at :][:8] for at in (0, 8, 1))
    assert launch_key(aligned) == launch_key(also_aligned)
    assert launch_key(aligned) != launch_key(unaligned)
    assert launch_key(aligned, unaligned) != launch_key(unaligned, aligned)


@pytest.mark.parametrize("other", [torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 9), torch.zeros(8, 4).T])
def test_dtype_size_and_strides_of_each_tell_tensors_apart(other):
    x = torch.zeros(4, 8)
    assert launch_key(x, x) == launch_key(x, x.clone())
    assert launch_key(x, x) != launch_key(x, other)
