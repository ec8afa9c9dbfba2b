"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from reclib.config import InputError
from reclib.train import saving

TENSORS = {"a": torch.arange(5.0), "b": torch.tensor(3)}


def test_round_trip(tmp_path):
    path = saving.save_checkpoint(tmp_path, "step-7", TENSORS, {"step": 7})
    tensors, state = saving.load_checkpoint(path)
    assert state["step"] == 7
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]


def test_saving_again_replaces_and_the_newest_by_number_is_latest(tmp_path):
    for step in (9, 10, 9):
        saving.save_checkpoint(tmp_path, f"step-{step}", TENSORS, {"step": step})
    assert saving.latest(tmp_path).name == "step-10"
    saving.save_checkpoint(tmp_path, "step-11", TENSORS, {})
    saving.prune(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_half_written_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step-5.partial").mkdir()
    assert saving.latest(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "no state", "half state", "no tensors"])
def test_damage_is_named_with_the_file_and_what_to_do(tmp_path, damage):
    path = saving.save_checkpoint(tmp_path, "step-7", TENSORS, {"step": 7})
    tensors, state = path / saving.TENSORS, path / saving.STATE
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(bytes(content))
    elif damage == "no state":
        state.unlink()
    elif damage == "half state":
        state.write_text(state.read_text()[:20])
    else:
        tensors.unlink()
    with pytest.raises(InputError, match=r"damaged checkpoint: .*step-7.*delete"):
        saving.load_checkpoint(path)


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of one megabyte."""
    point = tmp_path / "disk"
    point.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a tmpfs needs root on Linux")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_full_disk_is_one_clear_error_and_keeps_the_last_good_checkpoint(tiny_disk):
    small = {"a": torch.zeros(50_000)}
    saving.save_checkpoint(tiny_disk, "step-1", small, {"step": 1})
    with pytest.raises(InputError, match=r"cannot write .*step-2: .*last good one is step-1") as error:
        saving.save_checkpoint(tiny_disk, "step-2", {"a": torch.zeros(300_000)}, {"step": 2})
    assert "\n" not in str(error.value)
    assert [p.name for p in tiny_disk.iterdir()] == ["step-1"]
    assert torch.equal(saving.load_checkpoint(tiny_disk / "step-1")[0]["a"], small["a"])


def test_nothing_is_pickled(tmp_path):
    path = saving.save_checkpoint(tmp_path, "step-7", TENSORS, {"step": 7})
    assert sorted(p.name for p in path.iterdir()) == sorted([saving.TENSORS, saving.STATE])
    json.loads((path / saving.STATE).read_text())
    header = int.from_bytes((path / saving.TENSORS).read_bytes()[:8], "little")
    json.loads((path / saving.TENSORS).read_bytes()[8 : 8 + header])
