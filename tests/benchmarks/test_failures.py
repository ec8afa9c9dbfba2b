"""What fails in a benchmark is a row with its reason, and the others go on."""

import argparse
import json
import sys

import common
import data  # benchmarks/data.py
import engine
import numpy as np
import pytest

from reclib.data.prepare import synthetic_dataset


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(tmp_path, capsys):
    def process(code: str):
        return lambda: common.run_process([sys.executable, "-c", code])

    result = "print('a line before'); print('{\"seconds\": 2.0, \"loss\": NaN}')"
    kill = "import os; os.kill(os.getpid(), 9)"
    cases = {  # an action and the reason of its failure
        "fine": (process(result), None),
        "killed": (process(kill), "killed by SIGKILL: memory may have run out"),
        "raises": (process("raise ValueError('why')"), "exit code 1: ValueError: why"),
        "silent": (process("print('no object')"), "its last line is no JSON object"),
        "here": (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        "oom": (lambda: {"status": "oom", "reason": "too large"}, "too large"),
    }
    log = common.Rows(tmp_path / "out" / "rows.jsonl")
    results = log.in_turns({name: action for name, (action, _) in cases.items()}, 2)
    assert {name: len(rows) for name, rows in results.items()} == dict.fromkeys(cases, 0) | {"fine": 2}
    assert common.middle(results["fine"], "seconds") == 2.0
    assert np.isnan(common.middle(results["killed"], "seconds"))
    lines = (tmp_path / "out" / "rows.jsonl").read_text()
    assert lines == capsys.readouterr().out  # both as they come
    written = [json.loads(line) for line in lines.splitlines()]
    assert [row["name"] for row in written] == [*cases, "fine"]
    assert written[0]["loss"] is None
    reasons = {row["name"]: row["reason"] if row["status"] != "ok" else None for row in written}
    assert reasons == {name: reason for name, (_, reason) in cases.items()}
    assert log.failed


def test_a_peer_that_the_system_kills_does_not_lose_the_rows_of_the_others(tmp_path, monkeypatch):
    answer = 'echo \'{"shape": "ml", "loss": "full", "sequences_per_second": 5}\''
    for name, script in (("rectools", "kill -9 $$"), ("replay", answer)):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setattr(engine, "dataset_of", lambda _: synthetic_dataset(20, 30, 5.0, 0))
    rows = common.Rows(tmp_path / "rows.jsonl")
    results = engine.peers("ml", argparse.Namespace(peers=tmp_path, threads=1, quick=True), rows)
    assert {row["peer"] for row in results} == {"replay full", "replay restricted"}
    assert engine.over_fastest(results, {"sequences_per_second": 20})["speedup_over_fastest_peer"] == 4
    failed = [line for line in rows.file.read_text().splitlines() if '"failed"' in line]
    assert len(failed) == 2  # one for each setting of the allocator
    assert all('"rectools full"' in line and "killed by SIGKILL" in line for line in failed)


def test_the_engine_ends_with_its_ratios_whatever_variants_failed(monkeypatch):
    def run_child(script, call, environment):
        if call["name"] == engine.DEFAULTS:
            raise common.FailedError("killed by SIGKILL: memory may have run out")
        if call["name"] == "bound":
            return {"step_seconds": 0.4, "gemm_seconds": 0.3}
        assert ("MALLOC_TRIM_THRESHOLD_" in environment) == (call["name"] == engine.BEST)
        return {"step_seconds": 0.5, "sequences_per_step": 64, "grown_bytes": 3, "floor_bytes": 2}

    monkeypatch.setattr(engine, "run_child", run_child)
    args = argparse.Namespace(quick=True, rounds=2, threads=1, shapes=["electronics", "ml"], peers=None)
    rows = common.Rows()
    values = common.finite(engine.run(args, rows))
    assert (values["sequences_per_second"], values["ml_step_over_bound"]) == (128, 1.25)
    assert (values["speedup_over_seed_step"], values["ml_peak_memory_over_floor"]) == (None, 1.5)
    assert rows.failed


def test_an_action_on_data_gives_seconds_and_peak_memory_and_must_read_all(tmp_path):
    file = tmp_path / "reviews_500_5.json.gz"
    data.generate(file, 500)
    row = data.attempt("reading", file, 500)
    assert 0 < row["inside"] <= row["seconds"]
    assert row["peak_mb"] > 0
    with pytest.raises(common.FailedError, match="500 interactions of 501"):
        data.attempt("list of dicts", file, 501)
