"""Grids: what a file may say, each run once, stop and go on, two processes on one; how a grid is scored."""

import copy
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import PLACES, ROOT, refused
from small_grid import FILE, light_scoring, work, write
from small_models import Stop, stop_at

from reclib import cli, records, system
from reclib.config import ModelConfig, TrainConfig
from reclib.data.prepare import prepare
from reclib.evaluate import metrics
from reclib.experiments import baseline, grids
from reclib.experiments.notebook import Result
from reclib.report import figures, tables
from reclib.train.fit import Options


def run_all(**options: object) -> int:
    here = work()
    return grids.run_grid(here, here.runs(), Options(**options))


def names(rows: list[dict]) -> list[tuple[str, int]]:
    return sorted((row["own_params"]["model"], row["seed"]) for row in rows)


def test_every_run_is_trained_once_and_recorded_with_what_it_was(root):
    write(root)
    assert run_all() == 3
    assert run_all() == 0
    rows = work().rows("learning_curve")
    assert names(rows) == [("base", 0), ("base", 1), ("twin", 0)]
    twin = next(row for row in rows if row["own_params"]["model"] == "twin")
    assert twin["configuration"]["model"]["causal"]
    assert twin["configuration"]["train"]["objective"] == "next_item"
    assert twin["metrics"]["valid_ndcg@10"] == max(twin["series"]["valid_ndcg@10"])
    assert twin["metrics"]["lowest_valid_loss"] == min(twin["series"]["valid_loss"])
    ranks = np.load(work().file.with_suffix("") / f"{twin['params_hash']}.npz")["valid"]
    assert len(ranks) == twin["data"]["users"]
    assert float((ranks <= 10).mean()) == pytest.approx(twin["metrics"]["valid_hr@10"])
    write(root, arms={"renamed": {}, "longer": {"train": {"epochs": 3}}})
    assert run_all() == 2, "both seeds of the longer arm: a name makes no other run"


def test_a_stopped_grid_goes_on_within_the_run(root):
    write(root, arms={"base": {"train": {"checkpoint_seconds": 0}}}, seeds=[0])
    with pytest.raises(Stop):
        run_all(on_step=stop_at(7).on_step)
    assert work().rows("learning_curve") == []
    assert "under way" in grids.grid_status(work(), work().runs())[0]
    steps: list[int] = []
    assert run_all(on_step=lambda stats: steps.append(stats.step)) == 1
    assert steps[0] == 7  # the seventh was not in a checkpoint yet
    assert "trained: validation HR@10" in grids.grid_status(work(), work().runs())[0]


@pytest.mark.slow
def test_two_processes_share_a_grid(root):
    write(root)
    prepare(grids.read_grid("trial").data)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        counts = [pool.submit(run_all) for _ in range(2)]
        assert sum(count.result(120) for count in counts) == 3
    assert names(work().rows("learning_curve")) == [("base", 0), ("base", 1), ("twin", 0)]


def test_what_a_file_may_not_say_is_told_before_anything_is_trained(root):
    for changes, message in [
        ({"arms": {"base": {"split": "random"}}}, "arm 'base': parameter 'split' is 'random'"),
        ({"extra": 1}, "unknown parameter 'extra'"),
        ({"baselines": "ease"}, "parameter 'baselines' is 'ease'"),
        ({"arms": ["base"]}, "not of the form of such a file"),
        ({"arms": {"base": {"train": {"epoch": 1}}}}, "arm 'base': unknown parameter 'epoch'"),
        ({"arms": {"base": {"data": {"min_usr": 1}}}}, "arm 'base': unknown parameter 'min_usr'"),
        ({"predicts": {"of": "base"}}, "parameter 'from' is missing"),
        ({"predicts": {"of": "bse", "from": ["twin"]}}, "names 'bse', which is no arm"),
        ({"predicts": {"of": "base", "from": ["base"]}}, "predicts 'base' from itself"),
    ]:
        write(root, **changes)
        error = refused(None, grids.read_grid, "trial")
        assert error.startswith("trial.yaml: ")
        assert message in error


def test_the_command_names_unknown_grids_arms_and_seeds(root, capsys):
    write(root, arms=FILE["arms"] | {"gBCE, 128 negatives": {}})
    for arguments, message in [
        (["run", "tiral"], "unknown name 'tiral' in params/grids; known: trial"),
        (["status", "trial", "--arms", "bse"], "unknown arm 'bse' of grid 'trial'; known: base, twin"),
        (["status", "trial", "--seeds", "5"], "--seeds has 5; seeds of these arms: 0, 1"),
    ]:
        assert cli.entry(["grid", *arguments]) == 2
        assert message in capsys.readouterr().err
    command = ["status", "trial", "--arms", "gBCE, 128 negatives", "base", "--seeds", "1"]
    assert grids.grid_main(command) == 0
    assert capsys.readouterr().out.count("seed 1  not begun") == 2


def test_the_files_of_the_project_can_be_read():
    for file in (system.params() / "grids").glob("*.yaml"):
        trials = file.stem.startswith(("ablations", "trials")) or file.stem.endswith("-rates")
        assert trials or any(arm.final for arm in grids.read_grid(file.stem).arms)


def test_committed_runs_are_known_by_the_hash_of_their_configuration():
    """Otherwise they would be trained again: a new field must leave the hash of earlier runs as it was."""
    checked = 0
    for file in sorted((ROOT / "executed" / "cpu" / "grids").glob("*.jsonl")):
        for row in grids.read_rows(file):
            configuration = row.get("configuration", {})
            whole = configuration.get("split") == "leave_one_out" and "users" not in configuration
            if row["name"] == "learning_curve" and whole:
                model, train = ModelConfig(**configuration["model"]), TrainConfig(**configuration["train"])
                identity = {"model": model, "train": train, "data": row["data"]["fingerprint"]}
                assert records.params_hash(identity) == row["params_hash"], (file.name, row["own_params"])
                checked += 1
    assert checked > 20


# -- scoring -------------------------------------------------------------------------------------------------

ARMS = {
    "bert4rec": {"final": True},
    "twin": {"train": {"objective": "next_item", "prior": "counts"}, "final": True},
    "bert4rec (past)": {"split": "global_time", "final": True, "seeds": [0]},
    "bert4rec (users)": {"split": "random_users", "final": True, "seeds": [0]},
    "wide": {"model": {"hidden_dim": 64}, "seeds": [0]},
    "other": {"data": {"synthetic_seed": 1}, "final": True, "seeds": [0]},
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        for name in PLACES:
            patch.setenv(name, str(folder / name.lower()))
        light_scoring(patch)
        write(folder, arms=ARMS)
        here = work()
        grids.run_grid(here, here.runs(), Options())
        yield grids.score(here)


def named(results: list[Result], name: str, **params: object) -> list[Result]:
    return [r for r in results if r.name == name and params.items() <= r.params.items()]


def but_comparisons(results: list[Result]) -> list[Result]:
    """Return the results of the main split without the comparisons."""
    made = ("comparison", "group_comparison")
    return [r for r in results if r.name not in made and (r.name != "protocol" or r.seed is None)]


def means(results: list[Result]) -> dict[tuple[str, int | None], dict]:
    return {(r.params["model"], r.seed): r.metrics for r in named(results, "test_metrics")}


def test_a_grid_is_scored_with_baselines_and_intervals(scored):
    here = work()
    rows = here.rows("test_metrics")
    assert [row["metrics"] for row in rows] == [r.metrics for r in named(scored, "test_metrics")]
    overall = {model: numbers for (model, seed), numbers in means(scored).items() if seed is None}
    assert {"bert4rec", "twin", "popularity", "markov", "item_knn", "ease"} <= overall.keys()
    assert "wide" not in overall
    assert overall["twin_with_validation"] != overall["twin"]  # its counts alone are newer
    assert "bert4rec_with_validation" not in overall
    assert all(row["ndcg@10_low"] <= row["ndcg@10"] <= row["ndcg@10_high"] for row in overall.values())
    arm = here.grid.arms[0]
    files = [np.load(here.ranks_file(arm, seed)) for seed in arm.seeds]
    hits = np.mean([metrics.hit(file["test"], 10) for file in files], axis=0)
    assert overall["bert4rec"]["hr@10"] == pytest.approx(hits.mean())
    assert {seed for model, seed in means(scored) if model == "bert4rec"} == {None, 0, 1}


def test_comparisons_are_paired_corrected_and_need_three_seeds(scored):
    rows = named(scored, "comparison")
    assert {row.params["against"] for row in rows} == {"bert4rec", "other"}
    assert all(row.metrics["adjusted_p"] >= row.metrics["p"] for row in rows)
    (twin,) = (row.metrics for row in named(rows, "comparison", model="twin", metric="hr@10"))
    assert (twin["seeds"], twin["reference_seeds"]) == (2, 2), "too few for a claim"
    assert twin["difference_low"] <= twin["difference"] <= twin["difference_high"]
    assert len(named(scored, "group_comparison", group="later")) == len(rows)  # no two items have one time


def test_a_group_is_compared_by_its_users_alone():
    values = np.random.default_rng(0).random((2, 3, 5))  # models, seeds, users
    models: Any = [
        SimpleNamespace(name=name, seeds=[0, 1, 2], per_seed=lambda metric, rows=rows: rows)
        for name, rows in zip(("base", "other"), values, strict=True)
    ]
    users = np.array([1, 3, 4])
    for row in baseline.comparisons(models, "base", users=users, group="later"):
        assert (row.name, row.params["group"]) == ("group_comparison", "later")
        expected = values[1][:, users].mean() - values[0][:, users].mean()
        assert row.metrics["difference"] == pytest.approx(expected)


def test_the_shuffle_control_moves_what_uses_order_and_nothing_else(scored):
    rows = {row.params["model"]: row.metrics for row in named(scored, "shuffle_control")}
    assert rows["ease"]["shuffled"] == rows["ease"]["ndcg@10"]  # blind to order
    assert rows["markov"]["shuffled"] != rows["markov"]["ndcg@10"]
    assert rows["markov"]["shuffled_but_last"] == rows["markov"]["ndcg@10"]  # looks at the last item only


def test_arms_are_compared_on_validation_by_user_over_the_seeds_both_have(scored):
    rows = {result.params["model"]: result.metrics for result in grids.compare(work())}
    assert rows.keys() == {"twin", "wide"}  # another split is another question
    assert (rows["twin"]["seeds"], rows["wide"]["seeds"]) == (2, 1)
    twin = rows["twin"]
    assert twin["difference"] == pytest.approx(twin["value"] - twin["base"])
    for name in ("seed", "difference"):
        assert twin[f"{name}_low"] <= twin["difference"] <= twin[f"{name}_high"]
    assert all(row["p"] <= row["adjusted_p"] <= 1 for row in rows.values())  # Holm over the arms


def test_an_arm_of_other_data_is_scored_on_them(scored):
    here = work()
    base, other = here.dataset.fingerprint, here.data_of(here.grid.arms[-1]).fingerprint
    rows = [row for row in here.rows("test_metrics") if row["seed"] is None]
    models = {
        mark: {row["own_params"]["model"] for row in rows if row["data"]["fingerprint"] == mark}
        for mark in (base, other)
    }
    assert {"bert4rec", "twin", "ease"} <= models[base] - {"other"}
    assert {"other", "ease"} <= models[other] - {"bert4rec", "twin"}
    data = {json.dumps(row["configuration"].get("data")) for row in rows}
    assert data == {"null", '{"synthetic_seed": 1}'}


def test_kept_ranks_give_the_same_and_a_seed_that_chose_the_recipe_does_not_judge_it(scored, monkeypatch):
    """Baselines join a grid whose weights are gone; a changed recipe is another look, a scoring is none."""
    here = work()
    arm = here.grid.arms[0]
    trial = {"name": "learning_curve", "params_hash": here.key(arm, 1), "data": {"name": "trials-x"}}
    other = {"name": "learning_curve", "params_hash": here.key(arm, 0), "data": {"name": "scaling-x"}}
    monkeypatch.setattr(records, "committed", lambda: [trial, other])
    monkeypatch.setattr(grids.Work, "train", lambda *_: pytest.fail("asked for weights"))
    again = grids.score(here, from_ranks=True)
    assert but_comparisons(again) == but_comparisons(scored), "the seed that chose stays in the means"
    assert {row.metrics["reference_seeds"] for row in named(again, "comparison", against="bert4rec")} == {1}
    left_out = [row["configuration"].get("seeds_left_out") for row in here.rows("comparison")]
    assert {"bert4rec": [1]} in left_out
    assert ("pairwise_counts_with_validation", None) in means(again)
    fast = grids.Work(replace(here.grid, baselines="fast"), here.dataset, here.device)
    left = {model for model, _ in means(grids.score(fast, from_ranks=True))} & {
        "popularity",
        "markov",
        "ease",
        "item_knn",
    }
    assert left == {"popularity"}
    rows = here.rows("test_metrics") + here.rows("protocol")
    for place, row in enumerate(rows):  # every scoring is counted
        assert row["earlier"] == sum(r["params_hash"] == row["params_hash"] for r in rows[:place])
    counts, where = tables.scored_configurations(rows), here.dataset.fingerprint
    assert counts[where, "leave-one-out", "bert4rec"] == counts[where, "leave-one-out", "causal"] == 1
    wider = copy.deepcopy(rows)
    for row in wider:
        arms = row["configuration"]["arms"]
        model = row["own_params"]["model"].removesuffix("_with_validation")
        assert {arm.split(" (")[0] for arm in arms} == {model} & {"bert4rec", "twin", "other"}  # its own
        for arm_configuration in arms.values():
            arm_configuration["model"]["hidden_dim"] *= 2
    assert tables.scored_configurations(rows + wider)[where, "leave-one-out", "bert4rec"] == 2
    file = here.ranks_file(arm, 1)
    ranks = dict(np.load(file))
    grids.save_ranks(file, {"valid": ranks["valid"]})
    message = refused(None, grids.score, here, True)
    assert message.startswith("no ranks on the test split are kept of bert4rec seed 1")
    grids.save_ranks(file, ranks)


def test_what_is_not_trained_cannot_be_scored(root):
    write(root, arms=ARMS)
    untrained = "not trained yet: bert4rec seed 0, bert4rec seed 1, twin seed 0"
    assert untrained in refused(None, grids.score, work())
    write(root, arms={"bert4rec": {}})
    assert "it has no final arm" in refused(None, grids.score, work())


def test_runs_so_far_keep_what_they_show_and_a_later_scoring_needs_no_weights(root, capsys, monkeypatch):
    light_scoring(monkeypatch)
    write(root, arms={"base": {"final": True}, "counts": {"final": True, "train": {"prior": "counts"}}})
    here = work()
    arm, counts = here.grid.arms
    grids.run_grid(here, [(arm, 0), (counts, 0), (counts, 1)], Options())
    capsys.readouterr()
    assert grids.score_main(["trial", "--keep"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "kept: base seed 0, counts seed 0, counts seed 1"
    assert "@10" not in output
    assert not here.rows("test_metrics")

    for run in ((arm, 0), (counts, 0), (counts, 1)):  # the machine that trained them is gone
        shutil.rmtree(here.folder(*run))
    grids.run_grid(here, [(arm, 1)], Options())
    shutil.move(here.folder(arm, 1), root / "elsewhere")
    assert grids.score_main(["trial", "--keep"]) == 0
    output = capsys.readouterr().out
    assert "base seed 1 has a record and no weights here" in output
    assert output.splitlines()[-1] == "kept: base seed 0, counts seed 0, counts seed 1"
    shutil.move(root / "elsewhere", here.folder(arm, 1))
    assert {seed for model, seed in means(grids.score(here)) if model == "base"} == {None, 0, 1}
    assert not any(here.folder(*run).exists() for run in ((arm, 0), (counts, 0), (counts, 1)))


def test_ties_are_scored_by_rule_with_the_arms_that_are_trained(root, monkeypatch):
    light_scoring(monkeypatch)
    shuffled = {"ties": "shuffle", "ties_seed": 1}
    write(root, arms={"bert4rec": {"seeds": [0]}, "causal": {}, "bert4rec (shuffle)": {"data": shuffled}})
    here = work()
    grids.run_grid(here, here.runs()[:1], Options())
    results = grids.score_apart(here)
    keys = ("model", "ties", "ties_seed")
    overall = {tuple(r.params[key] for key in keys) for r in named(results, "tie_rule")}
    counts = ("pairwise_counts", "pairwise_counts_with_validation")
    rules = {(model, *rule) for model in counts for rule in (("source", 0), ("shuffle", 1))}
    assert overall == rules | {("bert4rec", "source", 0)}
    rows = tables.tie_rules(here.rows("tie_rule"))
    assert len(rows) == len(overall)  # means over seeds alone
    assert figures.show("tie_rules", *rows).layout.title.text.startswith("The order of ties moves NDCG@10")


def test_fewer_users_train_and_all_are_evaluated(root, monkeypatch):
    light_scoring(monkeypatch)
    arms = {"bert4rec": {}, "bert4rec (half)": {"users": 0.5}, "bert4rec (quarter)": {"users": 0.25}}
    write(root, seeds=[0], arms=arms)
    here = work()
    runs = [here.train(arm, 0, Options()) for arm in here.grid.arms]
    assert len({here.key(arm, 0) for arm in here.grid.arms}) == 3
    users = [set(run.histories.starts.tolist()) for run in runs]
    assert users[0] > users[1] > users[2]
    assert [len(part) / len(users[0]) for part in users] == pytest.approx([1, 0.5, 0.25], abs=0.01)
    grids.run_grid(here, here.runs(), Options())
    counts = [r for r in grids.score_apart(here) if r.params["model"] == "pairwise_counts"]
    assert [result.params["users"] for result in counts] == [1, 0.5, 0.25]
    whole, half, _ = (result.metrics["ndcg@10"] for result in counts)
    assert whole != half
    fewer = [row for row in here.rows("user_share") if row["own_params"]["users"] < 1]
    table = tables.user_shares(fewer)
    assert list(table.loc["BERT4Rec"].index) == [0.25, 0.5]
    numbers = {name: value for name, value in fewer[0]["metrics"].items() if name != "later_ndcg@10"}
    elsewhere = {"data": fewer[0]["data"] | {"name": "all-users"}, "name": "test_metrics"}
    on_all = fewer[0] | elsewhere | {"own_params": {"model": "bert4rec"}, "metrics": numbers}
    series = {"group": ["later"], "ndcg@10": [0.5]}
    by_time = on_all | {"name": "groups", "own_params": {"model": "bert4rec", "by": "time"}, "series": series}
    table = tables.user_shares([*fewer, on_all, by_time])
    assert table.loc["BERT4Rec"]["later"].iloc[-1] == 0.5
    assert list(table.loc["BERT4Rec"].index) == [0.25, 0.5, 1.0]
