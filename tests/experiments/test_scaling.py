"""The law, its prediction before the run, and notebook 03's runs: what fits, what was tuned, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import commit, refused, smoke
from small_grid import work
from small_grid import write as write_grid
from small_models import scores_after

from reclib import system
from reclib.config import InputError, model_config
from reclib.data.splits import leave_one_out
from reclib.evaluate import metrics, statistics
from reclib.experiments import baseline, grids, scaling
from reclib.experiments.scaling import Tuned
from reclib.hardware import resolve
from reclib.model.bert4rec import count_parameters
from reclib.train import fit as fit_module
from reclib.train import saving
from reclib.train.fit import Options, rank_targets

SMALL = ["w32d1", "w32d2", "w32d4", "w64d1"]
FILE = {
    "notebook": "03_scaling",
    "size": "w32d1",
    "seeds": [0, 1],
    "train": {"epochs": 1, "batch_size": 20, "eval_every": 1},
    "predicts": {"of": "largest", "from": SMALL},
    "arms": {size: {"size": size} for size in SMALL} | {"largest": {"size": "w64d4", "seeds": [0]}},
}


def write(root: Path, **changes: object) -> None:
    write_grid(root, **(FILE | changes))


def test_the_loss_on_validation_is_the_cross_entropy_over_all_items(root):
    write(root)
    here = work()
    trainer = here.train(here.grid.arms[0], 0, Options())
    valid = leave_one_out(here.dataset).valid
    losses = rank_targets(trainer, valid, with_losses=True).losses
    wanted = np.empty(len(valid.targets))
    for users, scores in metrics.model_scores(trainer.model, valid, trainer.where):
        shares = scores.double().softmax(1).numpy()
        wanted[users] = -np.log(shares[np.arange(len(users)), valid.targets[users] - 1])
    assert losses == pytest.approx(wanted, rel=1e-5)
    best = max(trainer.progress.history, key=lambda row: row["ndcg@10"])
    assert best["valid_loss"] == pytest.approx(wanted.mean(), rel=1e-5)


def test_a_law_that_is_there_is_found_and_extrapolated_and_many_fits_are_the_fit_of_each():
    sizes = np.array([25e3, 1e5, 2.2e5, 4e5, 9e5])
    for known in [(5.0, 30.0, 0.3), (0.0, 12.0, 0.08), (6.5, 4000.0, 0.9)]:
        true = statistics.Law(*known)
        law = statistics.fit(sizes, true(sizes))
        assert law.exponent == pytest.approx(known[2], rel=0.02)
        assert float(law(4e6)) == pytest.approx(float(true(4e6)), abs=0.01)
    losses = statistics.Law(5.0, 30.0, 0.3)(sizes) + np.random.default_rng(0).normal(0, 0.02, (7, 5))
    together = statistics.fit(sizes, losses)
    for i, row in enumerate(losses):
        assert [float(part[i]) for part in together] == pytest.approx(list(statistics.fit(sizes, row)))
    growing = statistics.fit([1e4, 1e5, 1e6, 1e7], [5.0, 5.1, 5.2, 5.3])
    assert growing.factor == 0, "losses that grow with size have no exponent to offer"
    assert float(growing(1e9)) == pytest.approx(5.15)
    with pytest.raises(ValueError, match="needs 4 sizes, there are 3"):
        statistics.fit([1, 2, 3, 3], [4, 3, 2, 2])


# -- the prediction before the run ---------------------------------------------------------------------------


def test_the_largest_starts_only_after_its_prediction_and_carries_its_hash(root, capsys):
    write(root)
    untrained = "not trained yet: w32d1 seed 0, w32d1 seed 1, w32d2 seed 0"
    assert untrained in refused(None, scaling.predict, work())
    here = work()
    assert grids.run_grid(here, [pair for pair in here.runs() if pair[1] == 0], Options()) == 4
    assert "not trained yet: w32d1 seed 1" in refused(None, scaling.predict, work())

    # A prediction is of one configuration: the arm that is trained longer is barred again.
    write(root, arms=FILE["arms"] | {"largest": {"size": "w64d4", "seeds": [0], "train": {"epochs": 2}}})
    here = work()
    assert grids.run_grid(here, here.runs(), Options()) == 4
    assert "largest, seed 0: barred until it is predicted" in capsys.readouterr().out
    assert "barred: not predicted yet" in grids.grid_status(work(), work().runs())[4]
    result = scaling.predict(work())
    predicted = work().rows("prediction")[-1]
    assert predicted["kind"] == "predicted"
    assert len(predicted["configuration"]["fitted_to"]) == 8
    assert grids.run_grid(here, here.runs(), Options()) == 1
    row = next(r for r in work().rows("learning_curve") if r["own_params"]["model"] == "largest")
    assert row["configuration"]["prediction"] == predicted["params_hash"]
    assert row["metrics"]["non_embedding"] == count_parameters(model_config("w64d4"))["non_embedding"]
    rows = work().rows("learning_curve") + work().rows("prediction")
    error = scaling.outcome(rows, "trial")["error"]
    assert error == pytest.approx(result.metrics["predicted"] - row["metrics"]["lowest_valid_loss"])
    assert "has begun (seed 0): what is known cannot be predicted" in refused(None, scaling.predict, work())
    assert scaling.predict_main(["trial", "--report"]) == 0
    assert "easured" in capsys.readouterr().out


def test_git_shows_whether_a_prediction_was_committed_before_the_run_began(root):
    write(root)
    file = system.committed() / "cpu" / "grids" / "trial.jsonl"
    file.parent.mkdir(parents=True)

    def at(hour: int) -> str:
        return f"2026-01-01T{hour:02}:00:00+00:00"

    def row(name: str, hour: int, key: str = "x", **fields: object) -> str:
        fixed = {"name": name, "time": at(hour), "params_hash": key, "timings": {}}
        return json.dumps(fixed | fields, sort_keys=True, separators=(",", ":")) + "\n"

    # Three predictions, each with a run of two hours that ended at 12.
    ended = {"timings": {"train_seconds": 7000, "eval_seconds": 200}}
    keys = ("aa", "bb", "cc")
    lines = [row("prediction", 8, key) for key in keys]
    lines += [row("learning_curve", 12, configuration={"prediction": key}, **ended) for key in keys]
    for hour, committed in ((9, lines[:1]), (11, lines[:2]), (13, lines)):
        file.write_text("".join(committed))
        commit(system.root(), GIT_COMMITTER_DATE=at(hour))
    before, late, unproven = scaling.committed_before("trial")
    assert before.startswith("aa: committed before the run began")
    assert late.startswith("bb: committed before its first record, after the run had begun")
    assert unproven.startswith("cc: only recorded before, not shown by git")


# -- the runs of notebook 03 ---------------------------------------------------------------------------------


@pytest.fixture
def p(monkeypatch):
    """Small smoke parameters, read before the project root is another."""
    with monkeypatch.context() as patch:
        patch.delenv("RECLIB_ROOT", raising=False)
        return smoke("03_scaling", sizes=["w32d1"], epochs=1, batch_size=8, max_len=20, tuned=False)


@pytest.fixture
def dataset(p, root, monkeypatch):
    monkeypatch.setenv("RECLIB_MODELS", str(root / "models"))
    write(root)
    return work().dataset


def test_what_does_not_fit_is_refused_before_anything_is_allocated(p, dataset, monkeypatch):
    monkeypatch.setattr(fit_module, "Bert4Rec", lambda config: pytest.fail("a model was made"))
    monkeypatch.setattr("reclib.cost.work.machine_bytes", lambda: 2**30)
    large = scaling.sized(p, dataset, "430m")
    message = r"this does not fit: estimated .* GiB .* of 0\.95 usable; .*(hidden_dim|smaller size)"
    with pytest.raises(InputError, match=message):
        fit_module.fit(large.model, dataset, large.train, resolve("cpu"))


def test_tuned_settings_are_taken_for_their_size_and_data_only(p, dataset):
    by = {"study": "a-study", "trial": 3, "trials": 9, "time": "2026-01-01T00:00:00"}
    chosen = Tuned({"dropout": 0.33}, {"mask_prob": 0.55, "epochs": 99}, by)
    scaling.write_tuned("w32d1", dataset.name, dataset.fingerprint, chosen)
    with_tuned = replace(p, tuned=True)
    untuned, tuned = (scaling.sized(params, dataset, "w32d1") for params in (p, with_tuned))
    assert (untuned.model.dropout, untuned.title) == (p.dropout, "w32d1")
    assert (tuned.model.dropout, tuned.train.mask_prob, tuned.train.epochs) == (0.33, 0.55, 1)
    assert tuned.title == "w32d1 (tuned)"
    assert scaling.sized(with_tuned, dataset, "w32d2").model.dropout == p.dropout
    row = scaling.settings([tuned]).loc["w32d1"]
    assert (row["mask_prob"], row["from"]) == (0.55, "a-study, trial 3 of 9, 2026-01-01")
    file = scaling.write_tuned("w32d1", dataset.name, "0" * 64, chosen)
    with pytest.raises(InputError, match=r"w32d1-synthetic\.yaml: tuned on synthetic .* tune anew"):
        scaling.sized(with_tuned, dataset, "w32d1")
    file.write_text("size: w32d1\n")
    with pytest.raises(InputError, match=r"w32d1-synthetic\.yaml: not of the form .*fingerprint"):
        scaling.sized(with_tuned, dataset, "w32d1")


def test_a_kept_model_recommends_what_the_trained_one_does(p, dataset):
    assert "no model 'm' is kept; here: none" in refused(None, saving.load_model, "m")
    size, split = scaling.sized(p, dataset, "w32d1"), leave_one_out(dataset)
    about = (p, dataset, split, resolve("cpu"), size.model, size.train, "a title")
    run = baseline.train_model("03_scaling", *about)
    trained = run.trainer.model.eval()
    folder = saving.save_model(trained, run.trainer.config, dataset, "m", run.best())
    model = saving.load_model("m")
    recommended = [item.key for item in model.recommend(model.keys[:3], k=5)]
    scores = scores_after(trained, [1, 2, 3])
    scores[:3] = -torch.inf
    assert recommended == [model.keys[int(i)] for i in scores.topk(5).indices]

    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0"}))
    assert "damaged model m" in refused(None, saving.load_model, "m")
