"""Which checkpoints count, which go, and that a whole one always stays; needs no OLMo-core."""

import pytest

from gated_attention.engine.whole import DONE_NAME, clear_unfinished, find_damage, keep_newest, last_whole, write_sizes


@pytest.fixture
def run(tmp_path):
    for step in (5, 10, 100):
        folder = tmp_path / f"step{step}"
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "rank0.pt").write_bytes(b"state")
        (folder / "weights").write_bytes(b"0123456789")
        write_sizes(folder)
        (folder / DONE_NAME).write_text("{}")
    return tmp_path


def steps(run):
    return sorted(int(path.name.removeprefix("step")) for path in run.glob("step*"))


def test_the_newest_is_the_last_by_number(run):
    assert last_whole(run).name == "step100"
    assert find_damage(run / "step100") is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"012345678"), "weights has 9 bytes, not 10"),
        (lambda folder: (folder / "train" / "rank0.pt").unlink(), "train/rank0.pt is missing"),
        (lambda folder: (folder / ".sizes.json").write_text("{"), "json"),
        (lambda folder: (folder / ".sizes.json").unlink(), "No such file"),
    ],
)
def test_a_damaged_one_is_named_and_removed(run, damage, reason):
    damage(run / "step100")
    said = []
    assert clear_unfinished(run, said.append).name == "step10"
    assert steps(run) == [5, 10]
    assert "step100 is damaged" in said[0]
    assert reason.lower() in said[0].lower()


def test_what_was_not_finished_goes_without_a_word(run):
    (run / "step100" / DONE_NAME).unlink()
    (run / "step101-tmp").mkdir()
    said = []
    clear_unfinished(run, said.append)
    assert (steps(run), said) == ([5, 10], [])


def test_pruning_keeps_whole_ones_only_and_never_the_last_goes(run):
    (run / "step100" / "weights").unlink()
    keep_newest(run, 1)
    assert steps(run) == [10, 100]
    keep_newest(run, 0)
    assert last_whole(run).name == "step10"
