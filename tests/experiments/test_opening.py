"""The opening of a notebook: parameters, device, data, and results that are one table and one record each."""

from __future__ import annotations

import pytest

from reclib import parameters, records
from reclib.config import InputError
from reclib.experiments.notebook import Result, open_notebook


def test_one_call_opens_a_notebook_and_results_are_one_table(project, monkeypatch, capsys):
    monkeypatch.setenv("RECLIB_DATA", str(project / "data"))
    names = parameters.profile("02_baseline", "smoke") | {"dataset": "synthetic", "gpu": "cpu"}
    study = open_notebook("02_baseline", names)
    said = capsys.readouterr().out
    assert "Device: cpu" in said
    assert "Data: synthetic, 300 users" in said
    assert "precision='fp32'" in said
    assert study.p.precision == "fp32", "from the device file"
    with pytest.raises(InputError, match="unknown parameter 'epoch'"):
        open_notebook("02_baseline", names | {"epoch": 3})

    shown: list[dict] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    results = [Result("answer", {"hr@10": 0.12345, "mrr": None}, {"model": "a"}, seed=s) for s in (None, 1)]
    study.record(*results)
    study.record(*results)  # the cell is run again
    assert [row["earlier"] for row in study.rows("answer")] == [1, 1]
    own = {"name": "answer", "params": {"model": "a"}, "metrics": {"hr@10": 0.123, "mrr": None}}
    assert shown[0][records.MIME] == [own, own | {"seed": 1}]
    assert shown[0]["text/plain"].count("0.123") == 2
    study.record(Result("one", {"a": 1234}), Result("two", {"b": 0.5}), Result("two", {"b": 0.6}))
    assert len(shown) == 3
    assert "a 1,234" in shown[-1]["text/plain"]
    assert study.show("comparison") == "comparison: nothing is recorded yet."
    study.findings("- and more")
    assert capsys.readouterr().out.endswith("- and more\n")


def test_data_that_are_no_dataset_are_named_by_the_caller(project):
    names = parameters.profile("06_hardware", "smoke") | {"gpu": "cpu"}
    study = open_notebook("06_hardware", names, lambda p: {"name": "made", "fingerprint": str(p.seed)})
    assert study.dataset is None
    assert study.run.result("x", {"y": 1})["data"] == {"name": "made", "fingerprint": "0"}
