"""`benchmarks/gpu.py`: stages that cannot harm each other, valid records, committed predictions."""

import json

import planner
import pytest
import torch
from conftest import ROOT, python

from reclib import records as reclib_records

pytestmark = pytest.mark.slow

# Stages that end in every way that one can, with a whole one after each.
BAD_STAGES = """
import os, signal, sys
import gpu, gpu_stages
def raises(b):
    raise ValueError("what a stage says")

gpu_stages.STAGES |= {
    "raises": raises, "hangs": lambda b: signal.pause(),
    "killed": lambda b: os.kill(os.getpid(), signal.SIGSEGV), "exits": lambda b: os._exit(3),
}
gpu.LIMITS |= {"raises": 9, "hangs": 0.25, "killed": 9, "exits": 9}
sys.exit(gpu.main(sys.argv[1:]))
"""
ENDS = {
    "env": "ok",
    "raises": "failed: ValueError: what a stage says",
    "hangs": "out of time after 1 s",
    "killed": "killed by SIGSEGV",
    "exits": "ended with exit code 3",
    "sizes": "ok",
    "batches": "ok",
}


def test_a_stage_that_fails_hangs_or_is_killed_leaves_the_next_one_whole(tmp_path):
    words = ["--device", "cpu", "--tiny", "--out", tmp_path, "--stages", ",".join(ENDS)]
    process = python("-c", BAD_STAGES, *words, cwd=ROOT / "benchmarks")
    assert process.returncode == 1, process.stderr
    rows = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert {row["name"]: row["status"] for row in rows} == ENDS
    records = reclib_records.read(tmp_path / "executed")  # checks each
    assert {record["name"] for record in records} == {"hardware_step", "planner_row"}
    raw = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    assert {"environment", "product", "copy", "row", "epoch"} <= {line["name"] for line in raw}
    steps = [record for record in records if record["name"] == "planner_row"]
    assert {record["own_params"]["set"] for record in steps} == {"sizes", "batches"}
    for record in steps:
        model, train = planner.configs(planner.row_of(record))
        assert (model.hidden_dim, train.precision) == (32, "fp32")
        assert train.batch_size == record["own_params"]["batch_size"]
        assert record["timings"]["step_seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    process = python(ROOT / "benchmarks" / "gpu.py", "--out", tmp_path / "row")
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert process.stderr.startswith("no GPU that torch can use is here")
    assert not (tmp_path / "row").exists()


def test_every_step_that_a_gpu_will_time_has_a_committed_prediction_by_which_it_is_judged():
    for label in ("h100", "h200"):
        written, records = planner.predictions(label), []
        missing = [row for row in planner.gpu_rows(label) if planner.key_of(row) not in written]
        assert not missing, f"python benchmarks/planner.py predict {label}"
        for prediction in written.values():
            assert len(prediction["sha256_of_the_model"]) == 64
            timings = prediction["predicted"]
            low, middle, high = (timings[f"step_seconds{end}"] for end in ("_low", "", "_high"))
            assert 0 < low <= middle <= high
            assert timings["peak_memory_bytes"] > 0
            own = {key: value for key, value in prediction.items() if key not in planner.WRITTEN}
            records.append({"own_params": own, "timings": timings | {"step_seconds": middle / 2}})
        errors = planner.errors(label, records)
        assert {(e["time"], e["memory"], e["written"]) for e in errors} == {(2.0, 1.0, True)}
    (error,) = planner.errors(label, [records[0] | {"own_params": records[0]["own_params"] | {"users": 96}}])
    assert not error["written"]
