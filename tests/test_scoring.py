"""Scoring a grid: what is recorded, from which weights, how often, and what cannot be scored."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import PLACES
from test_grid import FILE, work, write

from reclib import records
from reclib.config import InputError
from reclib.evaluate import metrics
from reclib.experiments import baseline, grids
from reclib.report import tables
from reclib.train.fit import Options

ARMS = {
    "bert4rec": {"final": True},
    "twin": {"train": {"objective": "next_item"}, "final": True},
    "bert4rec (past)": {"split": "global_time", "final": True, "seeds": [0]},
    "bert4rec (users)": {"split": "random_users", "final": True, "seeds": [0]},
    "wide": {"model": {"hidden_dim": 64}, "seeds": [0]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        for name in PLACES:
            patch.setenv(name, str(folder / name.lower()))
        yield folder


@pytest.fixture(scope="module")
def scored(place):
    write(place, arms=ARMS)
    here = work()
    grids.run_grid(here, here.runs(), Options())
    return grids.score(here)


def test_a_grid_is_scored_with_baselines_controls_and_protocols(scored):
    here = work()
    rows = here.rows("test_metrics")
    means = {row["own_params"]["model"]: row["metrics"] for row in rows if row["seed"] is None}
    assert {"bert4rec", "twin", "popularity", "markov", "item_knn", "ease"} <= means.keys()
    assert "wide" not in means
    assert all(one["ndcg@10_low"] <= one["ndcg@10"] <= one["ndcg@10_high"] for one in means.values())
    arm = next(arm for arm in here.grid.arms if arm.name == "bert4rec")
    files = [np.load(here.ranks_file(arm, seed)) for seed in arm.seeds]
    hits = np.mean([metrics.hit(file["test"], 10) for file in files], axis=0)
    assert means["bert4rec"]["hr@10"] == pytest.approx(hits.mean())
    assert all(
        {"valid", "test", "test kept", "test shuffled", "test top"} < set(file.files) for file in files
    )
    seeds = {row["seed"] for row in rows if row["own_params"]["model"] == "bert4rec"}
    assert seeds == {None, 0, 1}


def test_comparisons_are_paired_corrected_and_need_three_seeds(scored):
    rows = [result for result in scored if result.name == "comparison"]
    assert {row.params["against"] for row in rows} == {"bert4rec"}
    assert all(row.metrics["adjusted_p"] >= row.metrics["p"] for row in rows)
    twin = next(row for row in rows if row.params["model"] == "twin" and row.params["metric"] == "hr@10")
    assert baseline.claim(twin.metrics) == "too few seeds"
    low, high = twin.metrics["difference_low"], twin.metrics["difference_high"]
    assert low <= twin.metrics["difference"] <= high


def test_protocols_are_labelled_and_sampled_ones_are_not_comparable(scored):
    rows = [result for result in scored if result.name == "protocol"]
    by_name = {(row.params["model"], row.params["protocol"]): row for row in rows}
    sampled = [row for row in rows if "sampled, not comparable" in row.params["label"]]
    assert sampled
    assert not any(row.params["comparable"] for row in sampled)
    assert by_name["bert4rec", "global time, seen removed"].params["comparable"]
    assert ("bert4rec", "seed study's") in by_name
    assert not by_name["bert4rec", "seed study's"].params["comparable"]
    assert ("bert4rec", "random users (the seed study's), seen removed") in by_name


def test_the_shuffle_control_moves_what_uses_order_and_nothing_else(scored):
    rows = {row.params["model"]: row.metrics for row in scored if row.name == "shuffle_control"}
    assert rows["ease"]["shuffled"] == rows["ease"]["ndcg@10"]  # blind to order
    assert rows["markov"]["shuffled"] != rows["markov"]["ndcg@10"]
    assert rows["markov"]["shuffled_but_last"] == rows["markov"]["ndcg@10"]  # looks at the last item only


def test_groups_hold_every_user_once(scored):
    users = work().dataset.num_users
    rows = [row for row in scored if row.name == "groups" and row.params["model"] == "bert4rec"]
    assert {row.params["by"] for row in rows} == {"history", "popularity", "time"}
    assert all(sum(row.series["users"]) == users for row in rows)
    time = next(row.series for row in rows if row.params["by"] == "time")
    assert set(time["group"]) <= {"same time as the item before", "later"}
    whole = next(
        r.metrics
        for r in scored
        if r.name == "test_metrics" and r.params["model"] == "bert4rec" and r.seed is None
    )
    for metric in ("hr@10", "ndcg@10"):
        mean = np.average(time[metric], weights=time["users"])
        assert mean == pytest.approx(whole[metric])
    assert FILE["data"]["synthetic_users"] == users


def test_arms_are_compared_on_validation_by_user_over_the_seeds_both_have(scored):
    rows = {result.params["model"]: result.metrics for result in grids.compare(work())}
    assert rows.keys() == {"twin", "wide"}  # another split is another question
    assert (rows["twin"]["seeds"], rows["wide"]["seeds"]) == (2, 1)
    one = rows["twin"]
    assert one["difference"] == pytest.approx(one["value"] - one["base"])
    assert one["seed_low"] <= one["difference"] <= one["seed_high"]
    assert one["difference_low"] <= one["difference"] <= one["difference_high"]
    assert all(row["p"] <= row["adjusted_p"] <= 1 for row in rows.values())  # Holm over the arms


def test_every_scoring_is_counted(scored):
    grids.score(work())
    counts = [row["earlier"] for row in work().rows("test_metrics")]
    assert sorted(set(counts)) == [0, 1]


def test_kept_ranks_alone_give_the_same_again_and_count_as_the_same_configuration(scored, monkeypatch):
    """Baselines join a grid whose weights are gone; a changed recipe is another look, a scoring is none."""
    here = work()
    monkeypatch.setattr(grids.Work, "train", lambda *_: pytest.fail("asked for weights"))
    again = grids.score(here, from_ranks=True)
    means = {(r.params["model"], r.seed): r.metrics for r in again if r.name == "test_metrics"}
    assert means == {(r.params["model"], r.seed): r.metrics for r in scored if r.name == "test_metrics"}
    assert "pairwise_counts_with_validation" in {model for model, _ in means}
    rows = here.rows("test_metrics") + here.rows("protocol")
    counts = tables.looks(rows)
    where = here.dataset.fingerprint
    assert counts[where, "leave-one-out", "bert4rec"] == counts[where, "leave-one-out", "causal"] == 1
    wider = json.loads(json.dumps(rows))
    for row in wider:
        row["configuration"]["arms"]["bert4rec"]["model"]["hidden_dim"] *= 2
    assert tables.looks(rows + wider)[where, "leave-one-out", "bert4rec"] == 2
    first = here.grid.arms[0]
    with np.load(here.ranks_file(first, 1)) as file:
        kept = dict(file)
    grids.save_ranks(here.ranks_file(first, 1), {"valid": kept["valid"]})
    try:
        with pytest.raises(InputError, match="no ranks on the test split are kept of bert4rec seed 1"):
            grids.score(here, from_ranks=True)
    finally:
        grids.save_ranks(here.ranks_file(first, 1), kept)


def test_a_seed_that_chose_the_recipe_does_not_judge_it(scored, monkeypatch):
    here = work()
    arm = here.grid.arms[0]
    trial = {"name": "learning_curve", "params_hash": here.key(arm, 1), "data": {"name": "trials-x"}}
    other = {"name": "learning_curve", "params_hash": here.key(arm, 0), "data": {"name": "scaling-x"}}
    monkeypatch.setattr(records, "committed", lambda: [trial, other])
    assert grids.choosing_seeds(here, grids.final_arms(here)) == {"bert4rec": [1]}
    found = grids.score(here, from_ranks=True)
    seeds = {r.metrics["reference_seeds"] for r in found if r.name == "comparison"}
    assert seeds == {1}


def test_what_a_run_showed_on_the_test_split_is_kept_and_read_again(scored, monkeypatch):
    here = work()
    arm = here.grid.arms[0]
    conditions = baseline.draw(here.dataset, grids.leave_one_out(here.dataset).test)
    with np.load(here.ranks_file(arm, 0)) as file:
        kept = dict(file)
    again = baseline.assess_trained(here.train(arm, 0, Options()), conditions)
    fresh = grids.unpacked(kept)
    assert fresh.outcomes.keys() == again.outcomes.keys()
    for name, outcome in again.outcomes.items():
        assert fresh.outcomes[name][:3] == outcome[:3]
        assert np.array_equal(fresh.outcomes[name].ranks, outcome.ranks)
    for field in ("shuffled", "shuffled_but_last", "top"):
        assert np.array_equal(getattr(fresh, field), getattr(again, field))

    monkeypatch.setattr(baseline, "assess_trained", lambda *_: pytest.fail("looked at the test split again"))
    one = grids.assess_run(here, arm, 0, conditions)
    assert np.array_equal(one.ranks, again.ranks)


def test_runs_of_which_ranks_alone_are_kept_have_accuracy_and_comparisons(scored, capsys):
    here = work()
    arm = here.grid.arms[0]
    file = here.ranks_file(arm, 0)
    with np.load(file) as whole:
        kept = dict(whole)
    try:
        grids.save_ranks(file, {name: kept[name] for name in ("valid", "test", "test kept")})
        found = grids.score(here)
    finally:
        grids.save_ranks(file, kept)
    main = [result for result in found if result.params.get("protocol") is None]
    assert {result.name for result in main} == {"test_metrics", "comparison"}
    assert "ranks alone are kept of bert4rec" in capsys.readouterr().out
    means = {r.params["model"]: r.metrics for r in found if r.name == "test_metrics" and r.seed is None}
    before = {r.params["model"]: r.metrics for r in scored if r.name == "test_metrics" and r.seed is None}
    assert means["bert4rec"] == before["bert4rec"]


def test_what_is_not_trained_cannot_be_scored(root):
    write(root, arms=ARMS)
    with pytest.raises(InputError, match="not trained yet: bert4rec seed 0, bert4rec seed 1, twin seed 0"):
        grids.score(work())
    write(root, arms={"bert4rec": {}})
    with pytest.raises(InputError, match="it has no final arm"):
        grids.score(work())


def test_runs_so_far_keep_what_they_show_and_a_later_scoring_needs_no_weights(root, capsys):
    write(root, arms={"base": {"final": True}})
    here = work()
    arm = here.grid.arms[0]
    grids.run_grid(here, [(arm, 0)], Options())
    capsys.readouterr()
    assert grids.score_main(["trial", "--keep"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "kept: base seed 0"
    assert "@10" not in said
    assert not here.rows("test_metrics")

    shutil.rmtree(here.folder(arm, 0))  # the machine that trained seed 0 is gone
    grids.run_grid(here, [(arm, 1)], Options())
    assert [r.seed for r in grids.score(here) if r.name == "test_metrics" and r.seed is not None] == [0, 1]
    assert not here.folder(arm, 0).exists()
