from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from small_grid import work, write

from reclib.config import InputError, TrainConfig, model_config
from reclib.data.dataset import Evaluation, Histories, evaluated_users, evaluation, train_histories
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics, statistics
from reclib.experiments import grids
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.report import tables
from reclib.train.fit import Options, rank_targets
from reclib.train.trainer import Trainer

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import ours
import peer_common
import peers
import scoring
import selection as peer_selection

ROWS = [("one", 7), ("two", 7), ("two", 8), *(("long", item) for item in range(4, 10))]
RUN = ["--dataset", "synthetic", "--epochs", "2"]


@pytest.fixture
def small_file(tmp_path, monkeypatch):
    """Users of one, two and six interactions."""
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "cache"))
    path = tmp_path / "small.tsv"
    lines = [f"{user}\t{item}\t1\t{10**9 + second}\n" for second, (user, item) in enumerate(ROWS)]
    path.write_text("".join(lines))
    return path


def prepared(path: Path):
    return peers.prepare(peers.DataConfig(dataset=str(path), format="ml-100k", min_user=1, min_item=1))


def test_peers_read_what_our_side_trains_and_is_scored_on(tmp_path):
    dataset = synthetic_dataset(50, 40, 12.0, seed=3)
    scoring.write_sequences(dataset, tmp_path / "data.npz")
    read = peer_common.load(tmp_path / "data.npz")
    assert read.num_items == dataset.num_items
    train, test = train_histories(dataset), evaluation(dataset, "test")
    for user, (mine, after) in enumerate(zip(read.sequences(), read.sequences(True), strict=True)):
        assert mine.tolist() == dataset.items[train.starts[user] : train.ends[user]].tolist()
        history = dataset.items[test.histories.starts[user] : test.histories.ends[user]]
        assert after.tolist() == history.tolist()
    assert read.test is not None
    assert read.test.tolist() == test.targets.tolist()
    assert read.valid is not None
    assert read.valid.tolist() == evaluation(dataset, "valid").targets.tolist()


def test_users_too_short_to_be_evaluated_train_and_have_no_target(small_file, tmp_path):
    dataset = prepared(small_file)
    scoring.write_sequences(dataset, tmp_path / "data.npz")
    read = peer_common.load(tmp_path / "data.npz")
    assert read.valid is not None
    assert read.test is not None
    by_user = dict(zip(list(dataset.user_keys), range(3), strict=True))
    items = [dataset.item_keys[row].tolist() for row in read.sequences()]
    assert items[by_user["one"]] == ["7"]
    assert items[by_user["two"]] == ["7", "8"]
    assert items[by_user["long"]] == ["4", "5", "6", "7"]
    assert dataset.item_keys[read.test[by_user["long"]]] == "9"
    assert [read.test[by_user[user]] for user in ("one", "two")] == [0, 0]
    assert [read.valid[by_user[user]] for user in ("one", "two")] == [0, 0]


def part_of(histories: list[list[int]], targets: list[int]) -> Evaluation:
    items = np.array([item for row in histories for item in row], dtype=np.int32)
    ends = np.cumsum([len(row) for row in histories])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Evaluation(Histories(items, starts, ends), np.array(targets, dtype=np.int32))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(1, 6), items=st.integers(14, 40))
def test_a_list_of_ten_scores_as_the_scores_that_it_came_from(seed, users, items):
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(items)[:4] + 1 for _ in range(users)]
    part = part_of([row[:3].tolist() for row in drawn], [int(row[3]) for row in drawn])
    scores = rng.permuted(np.arange(users * items).reshape(users, items), axis=1)  # no ties
    by_scores = metrics.rank(
        iter([(np.arange(users), torch.tensor(scores, dtype=torch.float32))]), part, True, 10
    )
    assert by_scores.top is not None
    ranks = scoring.ranks_in(by_scores.top, part, items, "x")
    for metric in (metrics.hit, metrics.ndcg):
        assert metric(ranks, 10).tolist() == metric(by_scores.ranks, 10).tolist()


PART = part_of([[1, 2], [3]], [4, 5])


def test_a_miss_is_a_miss_in_a_catalogue_smaller_than_the_list():
    top = np.array([[3, 5, 6, 0, 0, 0, 0, 0, 0, 0], [5] + 9 * [0]])
    assert metrics.hit(scoring.ranks_in(top, PART, 6, "x"), 10).tolist() == [0, 1]


def test_lists_that_break_the_rules_are_refused():
    for top, said in [
        ([[4, 2, 6], [5, 1, 2]], "x: row 0 recommends item 2, seen by its user"),
        ([[4, 5, 6], [5, 1, 5]], "x: row 1 recommends an item twice"),
        ([[4, 5, 6], [5, 1, 51]], "x: item ids from 1 to 51, allowed: 0 to 50"),
        ([[4, 5, 6]], "x: 1 rows of recommendations for 2 users"),
    ]:
        with pytest.raises(InputError, match=said):
            scoring.ranks_in(np.array(top), PART, 50, "x")


def test_targets_that_their_user_has_had_are_counted():
    assert scoring.targets_seen(PART) == 0
    assert scoring.targets_seen(part_of([[4, 4, 2], [3]], [4, 5])) == 1


FAKE_PEER = """
import json, pathlib, sys
import numpy as np
given = dict(zip(sys.argv[1::1], sys.argv[2::1]))
data = np.load(given["--data"])
k, users = 10, len(data["valid"])
def lists(hits, targets):
    top = np.zeros((users, k), dtype=np.int32)
    top[:hits, 1] = targets[:hits]
    return top
arrays = {"look_epoch": np.array([1.0])}
if "--marks" in given:
    arrays |= {"mark_top": np.stack([lists(3, data["valid"]), lists(9, data["valid"])])}
    first = sys.argv.index("--marks") + 1
    arrays |= {"mark_minutes": np.array([float(word) for word in sys.argv[first : first + 2]])}
    arrays |= {"look_epoch": np.array([1.0, 2.0])}
else:
    arrays |= {"valid_top": lists(20, data["valid"]), "top": lists(5, data["test"])}
if given["--seed"] == "13":
    sys.exit("no luck")
np.savez(given["--out"], **arrays)
counter = pathlib.Path(given["--out"]).parent / "runs.txt"
with counter.open("a") as file:
    file.write(given["--seed"] + "\\n")
print("a line before")
print(json.dumps({"version": "0", "heads": given["--heads"], "startup_seconds": 3.5}))
"""


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """An environment whose python runs a stand-in, which finds the first targets, second in each list."""
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "cache"))
    (tmp_path / "fake.py").write_text(textwrap.dedent(FAKE_PEER))
    python = tmp_path / "environments" / "rectools" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/fake.py" "$@"\n')
    python.chmod(0o755)
    return tmp_path / "environments"


def peers_main(environments: Path, *words: str) -> tuple[int, Path]:
    out = environments.parent / "out"
    return peers.main([*RUN, "--environments", str(environments), "--out", str(out), *words]), out


def test_a_peer_is_run_scored_per_user_and_not_run_again(environments, capsys):
    status, out = peers_main(environments, "--seeds", "0", "1")
    assert status == 0
    result = np.load(out / "synthetic-rectools-bert4rec-h256-seed1.npz")
    record = json.loads((out / "synthetic-rectools-bert4rec-h256-seed1.json").read_text())
    users = len(result["users"])
    gain = 1 / np.log2(3)
    assert record["users"] == users == len(result["test_hr@10"])
    assert result["test_ndcg@10"][:5] == pytest.approx(gain)
    assert result["test_hr@10"].sum() == 5
    assert result["valid_hr@10"].sum() == 20
    assert record["test_ndcg@10"] == pytest.approx(5 * gain / users)
    assert record["reported"] == {"version": "0", "heads": "4", "startup_seconds": 3.5}
    assert (out / "runs.txt").read_text() == "0\n1\n"
    assert not list(out.glob("*.raw.npz"))

    assert peers_main(environments, "--seeds", "0", "1", "2")[0] == 0
    assert (out / "runs.txt").read_text() == "0\n1\n2\n"
    assert capsys.readouterr().out.count("finished before") == 2

    assert peers_main(environments, "--seeds", "0", "--patience", "3")[0] == 2
    assert "patience is 10 there and 3 here; use another --out" in capsys.readouterr().err


def test_a_curve_has_a_row_per_mark_and_no_test(environments):
    status, out = peers_main(environments, "--curve", "1", "2")
    assert status == 0
    result = np.load(out / "synthetic-rectools-bert4rec-h256-seed0-curve.npz")
    assert result["mark_hr@10"].sum(axis=1).tolist() == [3, 9]
    assert not [name for name in result.files if name.startswith("test")]


def test_a_peer_that_fails_leaves_no_result_and_is_run_again(environments, capsys):
    status, out = peers_main(environments, "--seeds", "13")
    assert status == 2
    assert "the peer ended with status 1" in capsys.readouterr().err
    assert not list(out.glob("*.json"))


def test_what_a_peer_does_not_have_is_told_in_one_line(environments, capsys):
    for words, said in [
        (["--peer", "replay"], "no replay environment in"),
        (["--peer", "replay", "--model", "sasrec"], "'model' is 'sasrec': replay has bert4rec"),
        (["--peer", "reclib", "-p", "learning_rat", "1"], "did you mean 'learning_rate'"),
    ]:
        assert peers_main(environments, *words)[0] == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_the_table_pairs_ours_with_a_peer_user_by_user(environments, capsys):
    peers_main(environments, "--seeds", "0")
    ours_too = ["--peer", "reclib", "--size", "nano", "--max-len", "8", "--valid-every", "1"]
    assert peers_main(environments, *ours_too)[0] == 0
    out = environments.parent / "out"
    mine = np.load(out / "synthetic-reclib-bert4rec-h32-seed0.npz")["test_ndcg@10"]
    theirs = np.load(out / "synthetic-rectools-bert4rec-h256-seed0.npz")["test_ndcg@10"]
    capsys.readouterr()
    assert peers_main(environments, "--table")[0] == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("ndcg@10  rectools")]
    interval = statistics.bootstrap(mine - theirs)
    assert f"{theirs.mean():.4f} (" in line
    assert f"minus it {interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})" in line


def test_peers_join_the_records_of_a_scored_grid(environments, root, monkeypatch, capsys):
    write(root, seeds=[0, 1], arms={"bert4rec": {"final": True}})
    here = work()
    grids.run_grid(here, here.runs(), Options())
    monkeypatch.setattr(peers, "prepare", lambda _: here.dataset)  # of fewer users than the name says
    assert peers_main(environments, "--seeds", "0")[0] == 0
    assert peers_main(environments, "--record", here.grid.name)[0] == 2
    assert "bert4rec is not scored yet: python -m reclib score" in capsys.readouterr().err

    grids.score(here)
    status, out = peers_main(environments, "--record", here.grid.name)
    assert status == 0
    rows = here.rows("peer_comparison")
    assert {row["own_params"]["metric"] for row in rows} == {"hr@10", "ndcg@10"}
    theirs = np.load(next(out.glob("*.npz")))["test_hr@10"]
    arm = here.grid.arms[0]
    hits = np.mean([metrics.hit(np.load(here.ranks_file(arm, s))["test"], 10) for s in arm.seeds], axis=0)
    row = next(row for row in rows if row["own_params"]["metric"] == "hr@10")
    assert row["metrics"]["difference"] == pytest.approx((theirs - hits).mean())
    assert (row["metrics"]["seeds"], row["metrics"]["reference_seeds"]) == (1, 2)
    table = tables.differences(here.rows("peer_comparison"), "peer_comparison")
    assert list(table["minus"]) == ["BERT4Rec", "BERT4Rec"]
    names = {r["own_params"]["model"] for r in here.rows("test_metrics")}
    assert "RecTools BERT4Rec (hidden 256)" in names


def test_a_peer_with_a_sampled_loss_says_so_in_its_name(environments, root, monkeypatch):
    write(root, arms={"bert4rec": {"final": True}})
    here = work()
    monkeypatch.setattr(peers, "prepare", lambda _: here.dataset)
    sampled = ["-p", "loss", "sampled", "-p", "negatives", "8"]
    assert peers_main(environments, *sampled, "--curve", "0.00001", "0.00002")[0] == 0
    assert peers_main(environments, "--record", here.grid.name)[0] == 0
    (row,) = here.rows("equal_time")
    assert row["own_params"]["model"] == "RecTools BERT4Rec (hidden 256, 8 negatives)"
    assert row["own_params"]["run"]["minutes"] is None


def test_curves_join_the_records_of_a_grid_that_is_not_scored(environments, root, monkeypatch):
    write(root, arms={"bert4rec": {"final": True}})
    here = work()
    monkeypatch.setattr(peers, "prepare", lambda _: here.dataset)
    marks, theirs_too = ["0.00001", "0.00002"], ["0.00002", "5"]  # the peer was asked at other times
    assert peers_main(environments, "--curve", *theirs_too)[0] == 0
    ours_too = ["--peer", "reclib", "--size", "nano", "--max-len", "8", "--valid-every", "1"]
    assert peers_main(environments, *ours_too, "--curve", *marks)[0] == 0
    status, out = peers_main(environments, "--record", here.grid.name)
    assert status == 0

    curves = {row["own_params"]["model"]: row for row in here.rows("equal_time")}
    assert set(curves) == {"BERT4Rec (ours)", "RecTools BERT4Rec (hidden 256)"}
    assert all(row["metrics"]["startup_seconds"] > 0 for row in curves.values())
    values = {
        name: np.load(next(out.glob(f"*-{name}-*curve.npz")))["mark_ndcg@10"]
        for name in ("reclib", "rectools")
    }
    assert curves["BERT4Rec (ours)"]["series"]["ndcg@10"] == pytest.approx(values["reclib"].mean(axis=1))
    rows = here.rows("equal_time_comparison")
    assert [row["own_params"]["minutes"] for row in rows] == [0.00002]
    gap = (values["rectools"][0] - values["reclib"][1]).mean()
    assert [row["metrics"]["difference"] for row in rows] == [pytest.approx(gap)]
    assert tables.equal_time(rows).shape == (1, 3)
    assert curves["RecTools BERT4Rec (hidden 256)"]["series"]["minutes"] == [0.00002, 5.0]
    assert here.rows("test_metrics") == []


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name: str):
        return getattr(__import__("time"), name)


DATA = peer_common.Data(
    items=np.array([1, 2]), offsets=np.array([0, 1, 2]), num_items=30, valid=np.array([5, 6]), test=None
)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(peer_selection, "time", clock)
    return clock


def selection_of(clock: Clock, places: list[int], **given):
    """A selection whose looks, of 1000 s each, find the first target at these places (0: nowhere)."""
    looks = iter(places)

    def recommend(with_valid: bool) -> np.ndarray:
        assert not with_valid
        clock.now += 1000.0
        np.random.rand()
        torch.rand(1)
        top = np.zeros((2, 10), dtype=np.int32)
        if place := next(looks):
            top[0, place - 1] = 5
        return top

    asked = {"epochs": None, "minutes": None, "marks": None, "valid_every": 1, "patience": 0} | given
    weights = {"w": torch.zeros(1)}
    made = peer_selection.Selection(argparse.Namespace(**asked), DATA, recommend, lambda: weights)
    made.start(steps_per_epoch=1)
    return made, weights


def train(made, weights, clock, epochs: int, seconds: float = 1.0) -> int:
    """Epochs of one step each; return how many were begun."""
    for epoch in range(1, epochs + 1):
        clock.now += seconds
        weights["w"] += 1
        made.step_done()
        made.epoch_done(epoch)
        if made.stop:
            return epoch
    return epochs


def test_the_best_epoch_is_kept_and_patience_ends_the_fit(clock):
    made, weights = selection_of(clock, [3, 1, 2, 2, 9], patience=2)
    assert train(made, weights, clock, 9) == 4
    assert made.best_row["epoch"] == 2
    assert made.best_row["ndcg@10"] == pytest.approx(0.5)
    assert made.best is not None
    assert made.best["w"].item() == 2  # a copy: training went on to 4
    assert made.best_top[0, 0] == 5


def test_looks_at_validation_are_off_the_clock_and_leave_chance_alone(clock):
    made, weights = selection_of(clock, [0, 0, 0], minutes=3 / 60)
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert train(made, weights, clock, 9) == 3
    made.finish()
    assert made.seconds == pytest.approx(3)
    assert made.eval_seconds == pytest.approx(3000)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_marks_are_looked_at_once_each_and_end_the_fit(clock):
    made, weights = selection_of(clock, [0, 2, 1], marks=[1, 2.5, 3])
    assert train(made, weights, clock, 99, seconds=40) == 5
    columns = made.arrays()
    assert columns["look_train_seconds"].tolist() == [80, 160, 200]
    assert columns["mark_top"].shape == (3, 2, 10)
    assert columns["mark_minutes"].tolist() == [1, 2.5, 3]


def test_a_last_epoch_between_looks_is_looked_at(clock):
    made, weights = selection_of(clock, [1, 2], epochs=3, valid_every=2)
    train(made, weights, clock, 3)
    assert [row["epoch"] for row in made.rows] == [2, 3]


def trainer_of(dataset) -> Trainer:
    torch.manual_seed(0)
    model = model_config("nano", num_items=dataset.num_items, max_len=8)
    config = TrainConfig(epochs=2, batch_size=8)
    device = resolve("cpu")
    return Trainer(Bert4Rec(model), train_histories(dataset), config, device, dataset.fingerprint)


def test_our_curve_does_not_change_training_and_ends_with_the_last_mark_or_the_schedule():
    dataset = synthetic_dataset(24, 30, 8.0, seed=1)
    valid = evaluation(dataset, "valid")
    plain = trainer_of(dataset)
    for _ in plain.steps():
        pass
    watched = trainer_of(dataset)
    found = ours.curve(watched, valid, [0.0, 1e9])
    assert found["mark_minutes"].tolist() == [0.0, 1e9]
    assert found["mark_ndcg@10"].shape == (2, len(evaluated_users(dataset)))
    first, last = found["look_train_seconds"]
    assert first < last == watched.progress.train_seconds  # the schedule ended long before the second mark
    final = rank_targets(plain, valid, True).ranks
    assert found["mark_ndcg@10"][1].tolist() == metrics.ndcg(final, 10).tolist()
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    cut = trainer_of(dataset)
    ours.curve(cut, valid, [0.0])
    assert cut.progress.step == 1
