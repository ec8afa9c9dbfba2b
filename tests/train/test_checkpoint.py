"""Checkpoints are whole or not there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from reclib.config import InputError
from reclib.train import saving

TENSORS = {"a": torch.arange(5.0), "b": torch.tensor(3)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_replaces_its_former_and_the_newest_by_number_is_latest(tmp_path):
    (tmp_path / "step-12.partial").mkdir()  # half written
    (tmp_path / "step-abc").mkdir()
    assert saving.latest(tmp_path) is None
    for step in (8, 9, 10, 9):
        path = saving.save_checkpoint(tmp_path, f"step-{step}", TENSORS, {"step": step})
    tensors, state = saving.load_checkpoint(path)
    assert state["step"] == 9
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert saving.latest(tmp_path).name == "step-10"
    saving.prune(tmp_path)
    assert names(tmp_path) == ["step-10", "step-9", "step-abc"]
    assert names(path) == sorted([saving.TENSORS, saving.STATE])


def test_damage_is_named_with_what_to_do(tmp_path):
    for file, damaged in (
        (saving.TENSORS, lambda content: content[:-3]),
        (saving.TENSORS, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (saving.TENSORS, None),
        (saving.STATE, lambda content: content[:20]),
        (saving.STATE, lambda content: b"{}"),
        (saving.STATE, None),
    ):
        path = saving.save_checkpoint(tmp_path, "step-7", TENSORS, {"step": 7})
        content = (path / file).read_bytes()
        (path / file).unlink()
        if damaged is not None:
            (path / file).write_bytes(damaged(content))
        with pytest.raises(InputError, match=r"damaged checkpoint: .*step-7.*delete"):
            saving.load_checkpoint(path)


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of one megabyte."""
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root on Linux")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_full_disk_is_one_clear_error_and_keeps_the_last_good_checkpoint(tiny_disk):
    small = {"a": torch.zeros(50_000)}
    saving.save_checkpoint(tiny_disk, "step-1", small, {"step": 1})
    with pytest.raises(InputError, match=r"^cannot write .*step-2: .*last good one is step-1.*$"):
        saving.save_checkpoint(tiny_disk, "step-2", {"a": torch.zeros(300_000)}, {"step": 2})
    assert names(tiny_disk) == ["step-1"]
    assert torch.equal(saving.load_checkpoint(tiny_disk / "step-1")[0]["a"], small["a"])
