"""The self-check passes here, and fails where something is wrong."""

import json

import torch

from reclib import hardware, system
from reclib.experiments import comparison
from reclib.train import losses as reclib_losses
from reclib.train import timing

CPU = hardware.resolve("cpu")


def test_every_check_passes_on_this_cpu_and_is_written(root, capsys):
    assert comparison.check_main(["cpu"]) == 0
    written = json.loads((system.executed() / "cpu" / comparison.FILE).read_text())
    assert written["passed"] is True
    names = ["exactness", "precision", "synchronisation", "out of memory"]
    assert [check["name"] for check in written["checks"]] == names
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
