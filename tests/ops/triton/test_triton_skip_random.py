"""The portable kernels that skip closed gates in random cases: half of them, in a file that another worker can take."""

import pytest

pytest.importorskip("triton")


@pytest.mark.trust
def test_kernels_compute_the_definition_in_150_random_cases(run_interpreted):
    run_interpreted("triton_skip_check.py", "150", "1")
