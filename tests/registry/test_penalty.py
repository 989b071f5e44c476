import pytest

from gated_attention.registry.penalty import GatePenalty


@pytest.mark.parametrize(
    ("weight", "target", "message"),
    [
        (0.0, None, "weight is 0.0"),
        (-1.0, None, "weight is -1.0"),
        (float("inf"), None, "weight is inf"),
        (0.1, 1.0, "target is 1.0"),
        (0.1, -0.1, "target is -0.1"),
    ],
)
def test_bad_penalties_are_refused_in_one_line(weight, target, message):
    with pytest.raises(ValueError, match=message) as error:
        GatePenalty(weight, target)
    assert "\n" not in str(error.value)


def test_penalties_are_told_in_words():
    assert GatePenalty(0.05).describe() == "gate penalty 0.05"
    assert GatePenalty(0.5, 0.4).describe() == "gate penalty up to 0.5, open share 0.4"
