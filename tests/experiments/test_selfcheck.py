"""The self-check passes here, and fails where something is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from reclib import hardware, records
from reclib.config import InputError
from reclib.experiments import comparison
from reclib.parameters import build, profile
from reclib.train import losses as reclib_losses
from reclib.train import timing

CPU = hardware.resolve("cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RECORDS", str(tmp_path))
    return tmp_path


def test_every_check_passes_on_this_cpu_and_is_written(root, capsys):
    assert comparison.check_main(["cpu"]) == 0
    written = json.loads((root / "cpu" / comparison.FILE).read_text())
    assert written["passed"] is True
    assert [one["name"] for one in written["checks"]] == [
        "exactness", "precision", "synchronisation", "out of memory",
    ]  # fmt: skip
    assert written["device"]["torch"] == torch.__version__
    assert "FAILED" not in capsys.readouterr().out


def test_each_check_fails_where_something_is_wrong(monkeypatch):
    true = reclib_losses._to_gradient

    def shifted(block, *others):
        result = true(block, *others)
        block *= 1.001
        return result

    clock = iter(range(1000))
    for module, name, wrong, check in (
        (reclib_losses, "_to_gradient", shifted, comparison.exactness),
        (timing, "head_dtype", lambda trainer: "fp32", comparison.precision),
        (comparison.time, "perf_counter", lambda: float(next(clock) ** 2), comparison.synchronisation),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert not check(CPU).passed, name


def test_a_check_that_breaks_is_a_failure_with_its_reason(monkeypatch, root, capsys):
    def exactness(device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(comparison, "CHECKS", (exactness,))
    assert comparison.check_main(["cpu"]) == 1
    assert "FAILED  exactness        RuntimeError: no kernel image" in capsys.readouterr().out


def test_rows_of_a_gpu_are_recorded_only_beside_a_passed_check(root):
    card = dict.fromkeys(records.CARD) | {"label": "l4", "type": "cuda", "name": "NVIDIA L4"}
    card |= {"torch": "2.13.0", "cuda": "13.0"}
    p, file = build("01_data_prep", profile("01_data_prep", "smoke")), root / "l4/selfcheck.json"
    file.parent.mkdir()
    for state in (
        None,
        {"passed": False, "device": card},
        {"passed": True, "device": card | {"torch": "2.12"}},
    ):
        if state is not None:
            file.write_text(json.dumps(state))
        with pytest.raises(InputError, match="no passed self-check of NVIDIA L4"):
            records.Run("01_data_prep", p, card)
        assert not (root / "l4/results.jsonl").exists()
    file.write_text(json.dumps({"passed": True, "device": card}))
    assert records.Run("01_data_prep", p, card).result("x", {"y": 1})["label"] == "l4"


def test_the_commands_refuse_what_they_do_not_know(capfd):
    assert comparison.check_main(["l40"]) == 2
    assert "unknown gpu label 'l40'" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        hardware.device_main(["chekc"])
    assert "invalid choice: 'chekc'" in capfd.readouterr().err
    assert hardware.device_main([]) == 0
