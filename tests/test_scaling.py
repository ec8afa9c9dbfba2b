"""The law and its prediction: recovered where it is known, recorded before what it predicts may start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_grid import FILE as GRID
from test_grid import work
from test_grid import write as write_grid

from reclib import system
from reclib.config import DEPTHS, SIZES, WIDTHS, InputError, TrainConfig, model_config
from reclib.data import batches
from reclib.data.prepare import Histories
from reclib.data.splits import leave_one_out
from reclib.evaluate import metrics, statistics
from reclib.experiments import baseline, grids, scaling
from reclib.model.bert4rec import count_parameters
from reclib.train.fit import Options, rank_targets

SMALL = ["w32d1", "w32d2", "w32d4", "w64d1"]
FILE = {
    "about": "a test",
    "notebook": "03_scaling",
    "data": GRID["data"],
    "size": "w32d1",
    "seeds": [0, 1],
    "model": {"max_len": 20},
    "train": {"epochs": 2, "batch_size": 8, "eval_every": 1},
    "predicts": {"of": "largest", "from": SMALL},
    "arms": {size: {"size": size} for size in SMALL} | {"largest": {"size": "w64d4", "seeds": [0]}},
}


def run_all() -> int:
    here = work()
    return grids.run_grid(here, here.runs(), Options())


def write(root: Path, **changes: object) -> None:
    write_grid(root, **(FILE | changes))


# -- sizes and counts ----------------------------------------------------------------------------------------


def test_depth_leaves_the_tables_alone_and_width_does_not():
    for width in WIDTHS:
        found = [count_parameters(model_config(f"w{width}d{depth}")) for depth in DEPTHS]
        assert len({row["item_tables"] for row in found}) == 1
        assert [row["non_embedding"] for row in found] == [
            depth * (12 * width**2 + 13 * width) + 2 * width for depth in DEPTHS
        ]


def test_counted_flops_are_those_of_the_closed_formula():
    for size in ["w32d1", "w64d4", "130m"]:
        rng = np.random.default_rng(0)
        lengths = rng.integers(2, 21, 40)
        ends = np.cumsum(lengths)
        histories = Histories(rng.integers(1, 31, ends[-1]).astype(np.int32), ends - lengths, ends)
        model = model_config(size, num_items=30, max_len=20)
        train = TrainConfig(batch_size=8)
        tokens = targets = squares = keys = 0
        epoch = batches.Epoch(histories, model, train, 0)
        for step in range(epoch.num_steps):
            samples = epoch.samples(step)
            tokens += int(samples.lengths.sum())
            squares += int((samples.lengths.astype(np.int64) ** 2).sum())
            of_token = np.repeat(samples.lengths, samples.lengths)
            targets += int(samples.is_target.sum())
            keys += int(of_token[samples.is_target].sum())
        wanted = baseline.closed_flops(model, tokens, targets, squares, keys)
        assert baseline.epoch_flops(model, train, histories).total == wanted


def test_the_loss_on_validation_is_the_cross_entropy_over_all_items(root):
    write(root)
    here = work()
    trainer = here.train(here.grid.arms[0], 0, Options())
    valid = leave_one_out(here.dataset).valid
    losses = rank_targets(trainer, valid, True, with_losses=True).losses
    wanted = np.empty(len(valid.targets))
    for users, scores in metrics.model_scores(trainer.model, valid, trainer.where):
        shares = scores.double().softmax(1).numpy()
        wanted[users] = -np.log(shares[np.arange(len(users)), valid.targets[users] - 1])
    assert losses == pytest.approx(wanted, rel=1e-5)
    best = max(trainer.progress.history, key=lambda row: row["ndcg@10"])
    assert best["valid_loss"] == pytest.approx(wanted.mean(), rel=1e-5)


# -- the law -------------------------------------------------------------------------------------------------


def test_a_law_that_is_there_is_found_and_extrapolated():
    for known in [(5.0, 30.0, 0.3), (0.0, 12.0, 0.08), (6.5, 4000.0, 0.9)]:
        sizes = np.array([25e3, 1e5, 2.2e5, 4e5, 9e5])
        true = statistics.Law(*known)
        found = statistics.fit(sizes, true(sizes))
        assert found.exponent == pytest.approx(known[2], rel=0.02)
        assert float(found(4e6)) == pytest.approx(float(true(4e6)), abs=0.01)


def test_a_fit_of_many_is_the_fit_of_each():
    sizes = np.array([1e4, 1e5, 2e5, 4e5, 8e5])
    losses = statistics.Law(5.0, 30.0, 0.3)(sizes) + np.random.default_rng(0).normal(0, 0.02, (7, 5))
    together = statistics.fit(sizes, losses)
    for i, row in enumerate(losses):
        assert [float(part[i]) for part in together] == pytest.approx(list(statistics.fit(sizes, row)))


def test_losses_that_grow_with_size_have_no_exponent_to_offer():
    found = statistics.fit([1e4, 1e5, 1e6, 1e7], [5.0, 5.1, 5.2, 5.3])
    assert found.factor == 0
    assert float(found(1e9)) == pytest.approx(5.15)


def test_a_prediction_has_a_band_only_where_there_are_seeds():
    true = statistics.Law(5.0, 30.0, 0.3)
    sizes = [1e4, 1e5, 2e5, 4e5, 8e5]
    rng = np.random.default_rng(1)
    single = statistics.predict({n: [float(true(n))] for n in sizes}, 4e6)
    assert single["low"] is None
    assert single["without_low"] <= single["predicted"] <= single["without_high"]
    several = statistics.predict({n: list(true(n) + rng.normal(0, 0.01, 3)) for n in sizes}, 4e6)
    assert several["low"] < several["predicted"] < several["high"]
    assert several["low"] < float(true(4e6)) < several["high"]


def test_too_few_sizes_are_no_law():
    with pytest.raises(ValueError, match="needs 4 sizes, there are 3"):
        statistics.fit([1, 2, 3, 3], [4, 3, 2, 2])


# -- the prediction before the run ---------------------------------------------------------------------------


def test_the_largest_starts_only_after_its_prediction_and_carries_its_hash(root, capsys):
    write(root)
    with pytest.raises(InputError, match="not trained yet: w32d1, w32d2, w32d4, w64d1"):
        scaling.predict(work())
    assert run_all() == 8
    assert "largest, seed 0: barred until it is predicted" in capsys.readouterr().out
    assert "barred: not predicted yet" in grids.grid_status(work(), work().runs())[4]
    result = scaling.predict(work())
    (predicted,) = work().rows("prediction")
    assert predicted["kind"] == "predicted"
    assert len(predicted["configuration"]["fitted_to"]) == 8
    assert run_all() == 1
    row = next(r for r in work().rows("learning_curve") if r["own_params"]["model"] == "largest")
    assert row["configuration"]["prediction"] == predicted["params_hash"]
    assert row["metrics"]["non_embedding"] == count_parameters(model_config("w64d4"))["non_embedding"]
    assert row["metrics"]["lowest_valid_loss"] == min(row["series"]["valid_loss"])
    found = scaling.outcome(scaling.work_rows(work()), "trial")
    assert found["error"] == pytest.approx(result.metrics["predicted"] - row["metrics"]["lowest_valid_loss"])
    with pytest.raises(InputError, match=r"has begun \(seed 0\): what is known cannot be predicted"):
        scaling.predict(work())
    assert scaling.predict_main(["trial", "--report"]) == 0
    assert "measured" in capsys.readouterr().out


def test_a_prediction_without_all_seeds_is_made_on_request_only(root):
    write(root)
    here = work()
    grids.run_grid(here, [pair for pair in here.runs() if pair[1] == 0], Options())
    with pytest.raises(InputError, match=r"not trained yet: w32d1 seed 1.*--early predicts without them"):
        scaling.predict(work())
    assert scaling.predict(work(), early=True).params["seeds"] == 1


def test_a_prediction_is_of_one_configuration(root):
    write(root)
    run_all()
    scaling.predict(work())
    longer = FILE["arms"] | {"largest": {"size": "w64d4", "seeds": [0], "train": {"epochs": 3}}}
    write(root, arms=longer)
    assert run_all() == 0


def test_what_a_file_may_not_say_of_predictions(root):
    for predicts, said in [
        ({"of": "largest"}, "expected an arm `of`, a list of arms `from`"),
        ({"of": "lagest", "from": SMALL}, "names 'lagest', which is no arm"),
        ({"of": "largest", "from": ["largest"]}, "predicts 'largest' from itself"),
    ]:
        write(root, predicts=predicts)
        with pytest.raises(InputError, match=r"trial\.yaml") as caught:
            grids.read_grid("trial")
        assert said in str(caught.value)


def test_a_size_that_does_not_divide_by_its_heads_is_refused(root, capsys):
    write(root, arms={"odd": {"size": "w96d2", "model": {"num_heads": 5}}} | FILE["arms"])
    assert scaling.predict_main(["trial"]) == 2
    assert "hidden_dim=96 must be divisible by num_heads=5" in capsys.readouterr().err
    write(root, arms={"odd": {"size": "w100d2"}} | FILE["arms"])
    assert scaling.predict_main(["trial"]) == 2
    assert "unknown size 'w100d2'" in capsys.readouterr().err


def test_the_learning_rates_of_the_committed_grids_follow_the_rule():
    files = sorted((system.params() / "grids").glob("scaling-*.yaml"))
    assert files
    for file in files:
        arms = grids.read_grid(file.stem).arms
        base = next(arm.train["learning_rate"] for arm in arms if arm.name == "w128d2")
        assert base == scaling.BASE_RATE * (2 if file.stem == "scaling-ml-1m" else 1)  # by trials
        for arm in arms:
            width = SIZES[arm.size]["hidden_dim"]
            factor = {"half": 0.5, "twice": 2.0}.get(arm.name.split()[-2] if "rate" in arm.name else "", 1.0)
            assert arm.train["learning_rate"] == pytest.approx(factor * scaling.learning_rate(width, base))
