"""The portable kernels that skip closed gates, in random cases: a file of their own, for a worker of its own."""

import pytest
from in_interpreter import run_interpreted

pytest.importorskip("triton")


@pytest.mark.trust
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernels_compute_the_definition_in_100_random_cases(seed):
    run_interpreted("triton_skip_check.py", "100", str(seed))
