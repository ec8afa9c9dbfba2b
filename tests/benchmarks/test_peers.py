"""Other libraries beside ours: the same data, lists that keep the rules, failures as rows, fair clocks."""

import json
import sys
import time
from argparse import Namespace

import harness
import numpy as np
import peers
import pytest
import scoring
import torch
from small_grid import work, write

from reclib.config import InputError, TrainConfig, model_config
from reclib.data.dataset import Evaluation, Histories, evaluated_users, evaluation, train_histories
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics
from reclib.experiments import grids
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.fit import Options, rank_targets
from reclib.train.trainer import Trainer


def part_of(histories: list[list[int]], targets: list[int]) -> Evaluation:
    lengths = [len(row) for row in histories]
    ends = np.cumsum(lengths)
    items = np.concatenate(histories).astype(np.int32)
    return Evaluation(Histories(items, ends - lengths, ends), np.array(targets, dtype=np.int32))


def test_peers_read_what_our_side_trains_and_is_scored_on(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "cache"))
    lengths = {"one": 1, "two": 2, "six": 6, "nine": 9}  # the first two are too short to be evaluated
    rows = [(user, item) for user, length in lengths.items() for item in range(length)]
    lines = [f"{user}\t{item}\t1\t{10**9 + second}\n" for second, (user, item) in enumerate(rows)]
    (tmp_path / "small.tsv").write_text("".join(lines))
    config = peers.DataConfig(dataset=str(tmp_path / "small.tsv"), format="ml-100k", min_user=1, min_item=1)
    dataset = peers.prepare(config)
    scoring.write_sequences(dataset, tmp_path / "data.npz")
    read, users = harness.load(tmp_path / "data.npz"), evaluated_users(dataset)
    assert (read.num_items, len(users)) == (9, 2)
    train, test = train_histories(dataset), evaluation(dataset, "test").histories
    for histories, sequences, of_users in [
        (train, read.sequences(), range(dataset.num_users)),
        (test, read.sequences(with_valid=True), users),
    ]:
        for user, start, end in zip(of_users, histories.starts, histories.ends, strict=True):
            assert sequences[user].tolist() == dataset.items[start:end].tolist()
    for part in ("valid", "test"):
        targets = np.zeros(dataset.num_users, dtype=np.int32)
        targets[users] = evaluation(dataset, part).targets
        assert getattr(read, part).tolist() == targets.tolist()


def test_a_list_of_ten_scores_as_the_scores_that_it_came_from():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        users, items = rng.integers(1, 7), rng.integers(14, 41)
        drawn = [rng.permutation(items)[:4] + 1 for _ in range(users)]
        part = part_of([row[:3] for row in drawn], [row[3] for row in drawn])
        scores = rng.permuted(np.arange(users * items).reshape(users, items), axis=1)  # no ties
        block = (np.arange(users), torch.tensor(scores, dtype=torch.float32))
        by_scores = metrics.rank(iter([block]), part, remove_seen=True, top_k=10)
        ranks = scoring.ranks_in(by_scores.top, part, items, "x")
        assert metrics.ndcg(ranks, 10).tolist() == metrics.ndcg(by_scores.ranks, 10).tolist()


def test_lists_that_break_the_rules_are_refused():
    part = part_of([[1, 2], [3]], [4, 5])
    for top, message in [
        ([[4, 2, 6], [5, 1, 2]], "x: row 0 recommends item 2, seen by its user"),
        ([[4, 5, 6], [5, 1, 5]], "x: row 1 recommends an item twice"),
        ([[4, 5, 6], [5, 1, 51]], "x: item ids from 1 to 51, allowed: 0 to 50"),
        ([[4, 5, 6]], "x: 1 rows of recommendations for 2 users"),
    ]:
        with pytest.raises(InputError, match=message):
            scoring.ranks_in(np.array(top), part, 50, "x")
    # A miss is a miss in a catalogue smaller than the list, too.
    top = np.array([[3, 5, 6, 0, 0, 0, 0, 0, 0, 0], [5] + 9 * [0]])
    assert metrics.hit(scoring.ranks_in(top, part, 6, "x"), 10).tolist() == [0, 1]
    repeated = part_of([[4, 4, 2], [3]], [4, 5])
    assert scoring.is_seen(repeated.targets[:, None], repeated, 50).tolist() == [[True], [False]]


# Recommends the first users' targets, second in each list; counts its runs; has no luck with seed 13.
FAKE_PEER = """
import json, pathlib, sys
import numpy as np
words = sys.argv[1:]  # the peer's script, its options
options = dict(zip(words, words[1:]))
data, out = np.load(options["--data"]), pathlib.Path(options["--out"])
def lists(hits, part):
    top = np.zeros((len(data[part]), 10), dtype=np.int32)
    top[:hits, 1] = data[part][:hits]
    return top
arrays = {"valid_top": lists(20, "valid"), "top": lists(5, "test")}
if "--marks" in options:
    minutes = np.array(words[words.index("--marks") + 1 :], dtype=float)
    arrays = {"mark_minutes": minutes, "mark_top": np.stack([lists(3, "valid"), lists(9, "valid")])}
if options["--seed"] == "13":
    sys.exit("no luck")
np.savez(out, look_epoch=np.array([1.0, 2.0]), **arrays)
with (out.parent / "runs.txt").open("a") as file:
    file.write(options["--seed"])
print("a line before")
print(json.dumps({"version": "0", "heads": options["--heads"], "startup_seconds": 3.5}))
"""


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """Runs `peers.main` on a small dataset, with an environment whose python runs a stand-in."""
    python = tmp_path / "environments" / "rectools" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{FAKE_PEER}")
    python.chmod(0o755)
    write(root, arms={"bert4rec": {"final": True}})
    dataset = work().dataset
    monkeypatch.setattr(peers, "prepare", lambda _: dataset)
    words = ["--environments", str(tmp_path / "environments"), "--out", str(tmp_path / "out")]
    return lambda *more: peers.main(["--dataset", "synthetic", "--epochs", "2", *words, *more])


OUR_RUN = ["--peer", "reclib", "--size", "nano", "--max-len", "8", "--valid-every", "1"]


def test_a_peer_is_run_scored_per_user_and_not_run_again(run, tmp_path, capsys):
    out, name = tmp_path / "out", "synthetic-rectools-bert4rec-h256-seed"
    assert run("--seeds", "13", "0", "1") == 1  # a run that fails is a row, and the next seed runs
    failed, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert "ended with status 1" in failed["reason"]
    assert "no luck" in failed["reason"]
    assert sorted(file.name for file in out.glob("*.json")) == [f"{name}0.json", f"{name}1.json"]
    result, record = np.load(out / f"{name}1.npz"), json.loads((out / f"{name}1.json").read_text())
    gain = 1 / np.log2(3)
    assert record["users"] == len(result["users"]) == len(result["test_hr@10"])
    assert result["test_ndcg@10"][:5] == pytest.approx(gain)
    assert (result["test_hr@10"].sum(), result["valid_hr@10"].sum()) == (5, 20)
    assert record["test_ndcg@10"] == pytest.approx(5 * gain / record["users"])
    assert record["reported"] == {"version": "0", "heads": "4", "startup_seconds": 3.5}
    assert not list(out.glob("*.raw.npz"))
    assert run("--seeds", "0", "1", "2") == 0
    assert (out / "runs.txt").read_text() == "012"
    assert capsys.readouterr().out.count("finished before") == 2
    for words, message in [
        (["--patience", "3"], "patience is 10 there and 3 here; use another --out"),
        (["--peer", "replay"], "no replay environment in"),
        (["--peer", "replay", "--model", "sasrec"], "'model' is 'sasrec': replay has bert4rec"),
        (["--peer", "reclib", "-p", "learning_rat", "1"], "did you mean 'learning_rate'"),
    ]:
        assert run(*words) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.slow
def test_peers_join_the_records_of_a_grid_user_by_user(run, tmp_path, capsys):
    assert run("--seeds", "0") == run(*OUR_RUN) == 0
    theirs = np.load(tmp_path / "out" / "synthetic-rectools-bert4rec-h256-seed0.npz")
    here = work()
    grids.run_grid(here, here.runs(), Options())
    assert run("--record", "trial") == 2
    assert "bert4rec is not scored yet: python -m reclib score" in capsys.readouterr().err
    grids.score(here)
    assert run("--record", "trial") == 0
    rows = {row["own_params"]["metric"]: row for row in here.rows("peer_comparison")}
    assert set(rows) == {"hr@10", "ndcg@10"}
    files = [here.ranks_file(here.grid.arms[0], seed) for seed in (0, 1)]
    hits = np.mean([metrics.hit(np.load(file)["test"], 10) for file in files], axis=0)
    numbers = rows["hr@10"]["metrics"]
    assert numbers["difference"] == pytest.approx((theirs["test_hr@10"] - hits).mean())
    assert (numbers["seeds"], numbers["reference_seeds"]) == (1, 2)
    assert "RecTools BERT4Rec (hidden 256)" in {r["own_params"]["model"] for r in here.rows("test_metrics")}


def test_curves_tell_the_engine_from_its_settings_and_leave_the_test_alone(run, tmp_path):
    sampled = ["-p", "loss", "sampled", "-p", "negatives", "8"]
    recipe = [*OUR_RUN, "--recipe", "rectools", "--hidden", "8"]
    assert run(*sampled, "--hidden", "8", "--curve", "0.00002", "5") == 0  # at other times than ours
    assert run(*OUR_RUN, "--curve", "0.00001", "0.00002") == 0
    assert run(*recipe, "--seeds", "0", "1", "--curve", "0.00002") == 0
    assert run("--record", "trial") == 0
    folder, end = tmp_path / "out", "seed0-curve.npz"
    names = ("rectools-bert4rec-h8", "reclib-bert4rec-h32", "reclib-bert4rec-as-rectools-h8")
    theirs, ours, _ = (np.load(folder / f"synthetic-{name}-{end}") for name in names)
    assert theirs["mark_hr@10"].sum(axis=1).tolist() == [3, 9]
    assert not [name for name in theirs.files if name.startswith("test")]

    here = work()
    curves = {row["own_params"]["model"]: row for row in here.rows("equal_time")}
    peer, published = "RecTools BERT4Rec (hidden 8, 8 negatives)", "BERT4Rec (ours)"
    with_recipe = "our engine, RecTools' settings (hidden 8)"
    assert set(curves) == {peer, published, with_recipe}
    assert curves[peer]["series"]["minutes"] == [0.00002, 5.0]
    assert curves[published]["series"]["ndcg@10"] == pytest.approx(ours["mark_ndcg@10"].mean(axis=1))
    assert min(row["metrics"]["startup_seconds"] for row in curves.values()) > 0
    train = curves[with_recipe]["own_params"]["run"]["settings"]["train"]
    assert (train["batch_size"], train["mask_prob"], train["last_item_share"]) == (128, 0.15, 0.0)
    (alone,) = here.rows("equal_recipe_comparison")
    assert (alone["own_params"]["model"], alone["own_params"]["against"]) == (peer, with_recipe)
    both = {row["own_params"]["model"]: row for row in here.rows("equal_time_comparison")}
    assert set(both) == {peer, with_recipe}
    assert both[peer]["own_params"]["minutes"] == 0.00002
    gap = (theirs["mark_ndcg@10"][0] - ours["mark_ndcg@10"][1]).mean()
    assert both[peer]["metrics"]["difference"] == pytest.approx(gap)
    assert here.rows("test_metrics") == []


def fit(clock: Namespace, places: list[int], most: int, seconds: float = 1.0, **options):
    """Train epochs of one step; looks of 1000 s each find the first target at these places (0: nowhere)."""
    data = harness.Data(np.array([1, 2]), np.array([0, 1, 2]), 30, valid=np.array([5, 6]), test=None)
    weights, looks = {"w": torch.zeros(1)}, iter(places)

    def recommend(with_valid: bool) -> np.ndarray:
        clock.now += 1000.0
        np.random.rand()
        torch.rand(1)
        top = np.zeros((2, 10), dtype=np.int32)
        if place := next(looks):
            top[0, place - 1] = 5
        return top

    defaults = {"threads": 1, "epochs": None, "minutes": None, "marks": None, "valid_every": 1, "patience": 0}
    peer = Namespace(data=data, recommend=recommend, module=Namespace(state_dict=lambda: weights))
    selection = harness.Selection(Namespace(**defaults | options), peer)
    selection.start(steps_per_epoch=1)
    for epoch in range(1, most + 1):
        clock.now += seconds
        weights["w"] += 1
        selection.step_done()
        selection.epoch_done(epoch)
        if selection.stop:
            break
    selection.finish()
    return selection, epoch


def test_a_fit_keeps_its_best_epoch_and_looks_are_off_the_clock_and_leave_chance_alone(monkeypatch):
    clock = Namespace(**vars(harness.time), now=0.0)
    clock.process_time = clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(harness, "time", clock)
    best, epochs = fit(clock, [3, 1, 2, 2, 9], 9, patience=2)
    assert (epochs, best.best_row["epoch"], best.best_row["ndcg@10"]) == (4, 2, pytest.approx(0.5))
    assert best.best["w"].item() == 2  # a copy: training went on to 4
    assert best.best_top[0, 0] == 5
    last, _ = fit(clock, [1, 2], 3, epochs=3, valid_every=2)  # a last epoch between looks is looked at
    assert [row["epoch"] for row in last.rows] == [2, 3]
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    limited, epochs = fit(clock, [0, 0, 0], 9, minutes=3 / 60)
    assert (epochs, limited.seconds, limited.eval_seconds) == (3, pytest.approx(3), pytest.approx(3000))
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    # Each mark is looked at once; the last ends the fit.
    curve, epochs = fit(clock, [0, 2, 1], 99, seconds=40, marks=[1, 2.5, 3])
    columns = curve.arrays()
    assert (epochs, columns["look_train_seconds"].tolist()) == (5, [80, 160, 200])
    assert columns["mark_top"].shape == (3, 2, 10)
    assert columns["mark_minutes"].tolist() == [1, 2.5, 3]


def test_our_curve_does_not_change_training_and_ends_with_the_last_mark_or_the_schedule():
    dataset = synthetic_dataset(24, 30, 8.0, seed=1)
    valid, config = evaluation(dataset, "valid"), TrainConfig(epochs=2, batch_size=8)

    def new_trainer() -> Trainer:
        torch.manual_seed(0)
        model = Bert4Rec(model_config("nano", num_items=dataset.num_items, max_len=8))
        return Trainer(model, train_histories(dataset), config, resolve("cpu"), dataset.fingerprint)

    plain = new_trainer()
    assert len(list(plain.steps())) == plain.total_steps
    watched = new_trainer()
    values = peers.curve(watched, valid, [0.0, 1e9])
    assert values["mark_minutes"].tolist() == [0.0, 1e9]
    first, last = values["look_train_seconds"]
    assert 0 < first < last < time.process_time()  # the schedule ended long before the second mark
    final = rank_targets(plain, valid).ranks
    assert values["mark_ndcg@10"][1].tolist() == metrics.ndcg(final, 10).tolist()
    for weight, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(weight, other)
    cut = new_trainer()
    peers.curve(cut, valid, [0.0])
    assert cut.progress.step == 1
