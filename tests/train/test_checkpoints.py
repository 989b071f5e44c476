"""A damaged checkpoint costs the steps since the one before, and never the run."""

import errno
import json
import os
import stat

import pytest
import torch
from training import lines, run

from gated_attention.train.checkpoints import find_damage, find_sound_checkpoint, last_checkpoint

DAMAGES = {
    "state cut": lambda folder: cut(folder / "trainer_state.json"),
    "state empty": lambda folder: (folder / "trainer_state.json").write_text(""),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
    "one bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "optimizer cut": lambda folder: cut(folder / "optimizer.pt"),
    "random state missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
    "seal cut": lambda folder: cut(folder / ".whole.json"),
    "seal of nothing": lambda folder: (folder / ".whole.json").write_text("{}"),
}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damaged_run(output, damage):
    with pytest.raises(KeyboardInterrupt):
        run(output, stop=7)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    DAMAGES[damage](output / "checkpoint-6")


def ends_as_uninterrupted(output, whole):
    expected, _ = run(whole)
    said = []
    assert find_sound_checkpoint(output, said.append).name == "checkpoint-3"
    assert len(said) == 1
    assert str(output / "checkpoint-6") in said[0]
    assert "continues from step 3" in said[0]
    resumed, _ = run(output)
    assert lines(output) == lines(whole)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    damaged_run(tmp_path / "broken", "one bit of the weights")
    ends_as_uninterrupted(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.trust
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_ends_in_the_same_bits(tmp_path, damage):
    damaged_run(tmp_path / "broken", damage)
    ends_as_uninterrupted(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.trust
@pytest.mark.parametrize(
    "damage",
    [
        name
        for name in DAMAGES
        if name not in ("one bit of the weights", "optimizer cut", "seal cut", "seal of nothing")
    ],
)
def test_damage_is_found_without_a_seal_except_inside_files(tmp_path, damage):
    run(tmp_path, steps=3)
    folder = tmp_path / "checkpoint-3"
    (folder / ".whole.json").unlink()
    assert find_damage(folder) is None
    DAMAGES[damage](folder)
    assert find_damage(folder)


def test_with_every_checkpoint_damaged_training_begins_again(tmp_path):
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    (tmp_path / "checkpoint-old").mkdir()
    said = []
    assert find_sound_checkpoint(tmp_path, said.append) is None
    assert [("checkpoint-6" in line, "restarts from step 0" in line) for line in said] == [
        (True, True),
        (False, True),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-old"]


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(tmp_path, monkeypatch):
    save = torch.save
    count = 0

    def full(thing, path, *arguments, **options):
        nonlocal count
        count += 1
        if count > 4:  # three files of the first checkpoint, one of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(thing, path, *arguments, **options)

    expected, _ = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            ValueError, match=r"cannot write .*checkpoint-6 \(.*No space left.*continues from step 3"
        ) as caught:
            run(tmp_path / "full")
    assert "\n" not in str(caught.value)
    assert last_checkpoint(tmp_path / "full").name == "checkpoint-3"
    resumed, _ = run(tmp_path / "full")
    assert lines(tmp_path / "full") == lines(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))


def test_others_may_read_what_they_may_read(tmp_path):
    run(tmp_path, steps=1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "checkpoint-1").iterdir()}
    assert modes == {0o666 & ~umask()}


def umask():
    found = os.umask(0)
    os.umask(found)
    return found
