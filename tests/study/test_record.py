import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import commit, refused, smoke

from reclib import records, system

CARD = dict.fromkeys(records.CARD) | {"label": "cpu", "name": "Some CPU", "threads": 2}


@pytest.fixture
def root(project: Path) -> Path:
    return project / "runs/executed"


def make_run(**changes: object) -> records.Run:
    data = {"name": "ml-100k", "fingerprint": "f00"}
    return records.Run("02_baseline", smoke("02_baseline", **changes), CARD, data)


def lines(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "cpu/results.jsonl").read_text().splitlines()]


def names(root: Path) -> list[str]:
    return [row["name"] for row in records.read(root)]


def test_a_record_holds_what_is_needed_to_believe_it(root, capsys):
    make_run(gpu="h100", dataset="/home/lovelace/ratings.csv").result(
        "bert4rec",
        {"hr_10": 0.123456789, "users": np.int64(943), "half": np.float32(0.5), "none": None},
        params={"head": "plain"},
        timings={"train_seconds": 3.5},
        series={"loss": [2.0, float("nan")]},
        seed=7,
    )
    assert capsys.readouterr().out == ""  # there is no notebook to display it in
    (entry,) = lines(root)
    assert entry == entry | {
        "metrics": {"hr_10": 0.123456789, "users": 943, "half": 0.5, "none": None},
        "timings": {"train_seconds": 3.5},
        "series": {"loss": [2.0, None]},
        "kind": "measured",
        "seed": 7,
        "profile": "custom",
        "label": "cpu",  # whatever is claimed
        "claimed": "h100",
        "data": {"name": "ml-100k", "fingerprint": "f00"},
        "own_params": {"head": "plain"},
    }
    assert entry["device"]["name"] == "Some CPU"
    assert (entry["params"]["epochs"], entry["params"]["dataset"]) == (2, "ratings.csv")
    assert entry["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(entry["code"]) == len(entry["params_hash"]) == 16
    assert entry["time"].endswith("+00:00")
    assert records.read(root) == [entry]


def test_the_number_of_processes_tells_results_apart_only_where_it_is_not_one(root):
    alone, pair = (make_run(**changes).result("x", {"a": 1}, seed=0) for changes in ({}, {"nproc": 2}))
    assert alone["params_hash"] != pair["params_hash"]
    assert (alone["params"]["nproc"], pair["params"]["nproc"], pair["profile"]) == (1, 2, "smoke")
    later = ("gpu", "tracker", "seeds", "nproc", "ties", "ties_seed")
    before = {k: v for k, v in alone["params"].items() if k not in later}
    assert alone["params_hash"] == records.params_hash(before | {"own": {}})  # as it was without a choice


def test_what_cannot_be_recorded_is_refused_before_anything_is_written(root):
    bad = [float("nan"), float("inf"), np.float64("nan"), "0.5", [1.0]]
    for metrics, options, part in [
        *(({"hr_10": value}, {}, "hr_10 of result 'x'") for value in bad),
        ({"a": 1}, {"kind": "guessed"}, "measured or predicted"),
        ({"a": 1}, {"device": CARD | {"label": "l4"}}, "measured on l4, which is not here"),
    ]:
        with pytest.raises(ValueError, match=part):
            make_run().result("x", metrics, **options)
    with pytest.raises(ValueError, match="device card lacks name"):
        records.Run("02_baseline", smoke("02_baseline"), {key: 0 for key in records.CARD if key != "name"})
    assert not root.exists()


def test_a_gpu_that_has_not_passed_its_self_check_records_nothing(root, project):
    def run(**changes: object) -> records.Run:
        return records.Run("02_baseline", smoke("02_baseline"), CARD | {"type": "cuda"} | changes)

    assert "no passed self-check of Some CPU" in refused(None, run)
    for place in (root, project / "executed"):
        (place / "cpu").mkdir(parents=True)
        (place / "cpu/selfcheck.json").write_text(json.dumps({"device": CARD, "passed": True}))
        run()
        assert "no passed self-check" in refused(None, lambda: run(torch="3"))
        (place / "cpu/selfcheck.json").unlink()


def test_folders_of_paths_do_not_get_into_records():
    for text, kept in [
        ("/home/ada/data/ratings.csv", "ratings.csv"),
        ("C:\\Users\\ada\\ratings.csv", "ratings.csv"),
        ("no file '/home/ada/x.csv'", "no file 'x.csv'"),
        ("3 tokens/s and/or https://grouplens.org/a/b", "3 tokens/s and/or https://grouplens.org/a/b"),
        ("ml-100k", "ml-100k"),
    ]:
        assert system.plain({"a": [text]}) == {"a": [kept]}


def test_an_unfinished_last_line_goes_and_a_whole_one_without_its_newline_stays(root, capsys):
    make_run().result("x", {"a": 1})
    file = root / "cpu/results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    assert len(records.read(root)) == 1
    assert "cpu/results.jsonl:2: unfinished line: skipped" in capsys.readouterr().err
    make_run().result("y", {"a": 2})
    assert names(root) == ["x", "y"]
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    make_run().result("z", {"a": 2})
    assert names(root) == ["x", "y", "z"]


def test_a_line_that_is_no_record_is_skipped_and_counted_and_not_merged(root, capsys, tmp_path):
    make_run().result("x", {"a": 1})
    file = root / "cpu/results.jsonl"
    good = file.read_text()

    def changed(**values):
        return json.dumps(json.loads(good) | values)

    for line, part in [
        ('{"schema": 1, "na', "truncated"),
        (changed(profile="huge"), "unknown profile 'huge'"),
        (changed(metrics={"a": float("nan")}), "not a record"),
        (changed(time=1), "Expected `str`, got `int` - at `$.time`"),
        (changed(time="yesterday"), "Invalid isoformat"),
        (changed(label="a100"), "a record of 'a100'"),
        (good.strip().replace('"x"', '"\udcff"'), "utf-8"),
    ]:
        file.write_text(good + line + "\n" + good + line + "\n", errors="surrogateescape")
        assert names(root) == ["x"], line
        error = capsys.readouterr().err
        assert error.startswith("cpu/results.jsonl:2: ")
        assert part.lower() in error.lower(), error
        assert error.endswith(", and 1 more: skipped\n")
        assert refused(None, records.merge, root, tmp_path / "other").startswith("cpu/results.jsonl:2: ")


def test_latest_keeps_the_newest_of_each(root):
    run = make_run(seeds=[0, 1])
    run.result("x", {"a": 1.0}, seed=0)
    run.result("x", {"a": 2.0}, seed=1)
    run.result("x", {"a": 3.0}, seed=0, params={"k": 1})
    make_run(gpu="l4", seeds=[0]).result("x", {"a": 4.0}, seed=0)  # the same work as the first
    make_run(epochs=9).result("x", {"a": 5.0}, seed=0)
    run.result("x", {"a": 6.0}, seed=0, kind="predicted")
    values = sorted(entry["metrics"]["a"] for entry in records.latest(records.read(root)))
    assert values == [2.0, 3.0, 4.0, 5.0, 6.0]


def test_latest_goes_by_time_and_a_run_that_two_grids_hold_keeps_a_record_in_each():
    trial = dict.fromkeys(("notebook", "kind", "label", "name", "params_hash", "seed"), "s")
    trial |= {"time": "2026-01-01T00:00:00+00:00", "data": {"name": "trials"}}
    former = trial | {"time": "2026-01-02T00:00:00+00:00", "data": {"name": "headline"}}
    newest = former | {"time": "2026-01-03T00:00:00+00:00"}
    assert records.latest([trial, newest, former]) == [trial, newest]


def test_a_record_counts_the_earlier_ones_of_its_configuration_and_the_committed_ones(root, project):
    run = make_run()
    counts = [run.result("test_metrics", {"hr@10": 0.1}, seed=seed)["earlier"] for seed in (0, 0, 1, 0)]
    assert counts == [0, 1, 0, 2]
    assert run.result("test_metrics", {"hr@10": 0.1}, params={"model": "x"}, seed=0)["earlier"] == 0
    root.rename(project / "executed")
    assert run.result("test_metrics", {"hr@10": 0.1}, seed=0)["earlier"] == 3


def test_a_result_is_dirty_where_what_it_depends_on_is_in_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "CHECKOUT", tmp_path)
    monkeypatch.setattr(system, "PACKAGE", tmp_path / "reclib")
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    files = {"reclib/room/a.py": "1", "reclib/page.css": "1", "params/grids/x.yaml": "1", "README.md": "1"}
    files |= {f"notebooks/{name}.ipynb": '{"cells": []}' for name in ("one", "two")}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert records.git_state("one") is None
    first = commit(tmp_path)
    clean = {"commit": first, "dirty": False}
    row = {"notebook": "one", "code": records.code_hash("one")}
    code = '{"cells": [{"cell_type": "code", "source": ["2"]}]}'
    text = code.replace('"code"', '"markdown"')
    for name in files:  # a grid and a profile stand in the record itself
        if not name.endswith(".py"):
            (tmp_path / name).write_text(text if name.endswith("one.ipynb") else code)
            assert records.git_state("one") == clean, name
    for name in ("reclib/room/a.py", "reclib/room/new.py", "notebooks/one.ipynb", "params/efficiency.yaml"):
        (tmp_path / name).write_text(code)
        assert records.git_state("one") == {"commit": first, "dirty": True}, name
        (tmp_path / name).unlink()
        subprocess.run(["git", "checkout", "-q", "--", *{name} & files.keys()], cwd=tmp_path, check=True)
    (tmp_path / "reclib/room/a.py").rename(tmp_path / "reclib/a.py")
    rows = [row, {"notebook": "one", "code": records.code_hash("one")}]
    assert records.code_in_git(rows).endswith(f"no commit has the code of 1 of one {rows[1]['code']}")
    second = commit(tmp_path)
    commits = records.commits_of_code(["one"])
    assert [commits[row["notebook"], row["code"]] for row in rows] == [first, second]


WRITER = """
import resource, sys
from pathlib import Path
from reclib import records
if limit := int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for i in range(40):
    records.append(Path(sys.argv[1]), {"series": [i] * 3000})
"""


def start_writer(root: Path, limit: int = 0) -> subprocess.Popen[str]:
    """Start a process that appends 40 lines of one number each, to a file of at most `limit` bytes."""
    command = [sys.executable, "-c", WRITER, str(root / "cpu/results.jsonl"), str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_writers_at_the_same_time_do_not_mix_their_lines(root):
    writers = [start_writer(root) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    entries = lines(root)
    assert len(entries) == 120
    assert all(len(set(entry["series"])) == 1 for entry in entries)


def test_a_full_disk_leaves_whole_lines_only(root):
    _, error = start_writer(root, limit=50_000).communicate(timeout=60)
    assert "No space left" in error
    assert (root / "cpu/results.jsonl").read_bytes().endswith(b"\n")
    assert 1 <= len(lines(root)) < 40
