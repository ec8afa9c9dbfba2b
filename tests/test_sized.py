"""Runs of notebook 03: what fits, what was tuned for these data, models that are kept, and their figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from reclib import (
    data,
    footprint,
    kept,
    params,
    paths,
    scaling,
    scaling_figures,
    scaling_tables,
    sized,
    tables,
    tuned,
)
from reclib.config import DataConfig, InputError, model_config
from reclib.hardware import resolve
from reclib.splits import leave_one_out
from reclib.tuned import Tuned

GIB = 2**30


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    for name in ("RECLIB_DATA", "RECLIB_RUNS", "RECLIB_RECORDS", "RECLIB_MODELS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def dataset():
    return data.prepare(
        DataConfig(dataset="synthetic", synthetic_users=40, synthetic_items=30, min_user=1, min_item=1)
    )


def asked(**changes):
    small = {"sizes": ["w32d1"], "epochs": 1, "batch_size": 8, "max_len": 20, "tuned": False}
    return params.build("03_scaling", params.profile("03_scaling", "smoke") | small | changes)


def test_a_catalogue_that_memory_does_not_allow_is_refused_before_anything_is_allocated(dataset):
    p = asked(sizes=["430m"])
    with pytest.raises(InputError, match=r"this does not fit: estimated .* GiB .*") as caught:
        sized.demand_fit(p, dataset, leave_one_out(dataset), resolve("cpu"), "430m", room=GIB)
    assert "hidden_dim" in str(caught.value) or "smaller size" in str(caught.value)


def test_an_l4_trains_the_largest_named_size_at_the_full_profile():
    p = params.build("03_scaling", params.profile("03_scaling", "full"))
    model = model_config("430m")
    train = sized.recipe(p, "430m", 0)
    lengths = np.random.default_rng(0).geometric(1 / 9.25, 20_000) + 4
    found = footprint.require_fit(model, train, lengths, 23 * 10**9, "bf16", "cuda")
    assert found.total < 23e9
    whole = params.build("03_scaling", params.profile("03_scaling", "full") | {"micro_batch_size": 512})
    larger = footprint.memory(model, sized.recipe(whole, "430m", 0), lengths, "bf16", "cuda")
    assert larger.total > found.total, "that is what accumulation is for"


def test_tuned_settings_are_taken_for_their_size_and_data_only(dataset, root, monkeypatch):
    monkeypatch.setattr(paths, "params", lambda: root / "params")
    chosen = Tuned({"dropout": 0.33}, {"mask_prob": 0.55, "epochs": 99}, {})
    tuned.write("w32d1", dataset.name, dataset.fingerprint, chosen)
    monkeypatch.undo()
    p = asked()
    monkeypatch.setattr(tuned.paths, "params", lambda: root / "params")
    assert sized.configs(p, dataset, "w32d1", 0)[0].dropout == p.dropout
    from dataclasses import replace

    model, train = sized.configs(replace(p, tuned=True), dataset, "w32d1", 0)
    assert (model.dropout, train.mask_prob, train.epochs) == (0.33, 0.55, 1)
    assert sized.configs(replace(p, tuned=True), dataset, "w32d2", 0)[0].dropout == p.dropout
    tuned.write("w32d1", dataset.name, "0" * 64, chosen)
    with pytest.raises(InputError, match="tune anew"):
        sized.configs(replace(p, tuned=True), dataset, "w32d1", 0)


def test_a_kept_model_recommends_what_the_trained_one_does(dataset):
    p = asked()
    one = sized.train(p, dataset, leave_one_out(dataset), resolve("cpu"), "w32d1", 0)
    kept.save(one.trainer, dataset, "w32d1-synthetic", one.best())
    files = {file.name for file in (paths.models() / "w32d1-synthetic").iterdir()}
    assert files == {"model.safetensors", "config.json", "manifest.json"}
    model = kept.load("w32d1-synthetic")
    history = model.keys[:3]
    found = model.recommend(history, k=5)
    assert len({one.key for one in found}) == 5
    assert not {one.key for one in found} & set(history)
    config = one.trainer.model.config
    items = np.array([1, 2, 3, config.mask_id])
    import torch

    with torch.no_grad():
        rows = torch.from_numpy(items)[None]
        hidden = one.trainer.model.eval().encode(rows, torch.ones_like(rows), torch.arange(4)[None])
        scores = one.trainer.model.logits(hidden[0, -1:])[0, 1 : config.num_items + 1]
    scores[:3] = -torch.inf
    best = [model.keys[int(i)] for i in scores.topk(5).indices]
    assert [one.key for one in found] == best


def test_what_a_kept_model_refuses(dataset):
    with pytest.raises(InputError, match=r"no model 'x' is kept; here: none"):
        kept.load("x")
    one = sized.train(asked(), dataset, leave_one_out(dataset), resolve("cpu"), "w32d1", 0)
    folder = kept.save(one.trainer, dataset, "m", {})
    with pytest.raises(InputError, match="the history is empty"):
        kept.load("m").recommend([])
    with pytest.raises(InputError, match="unknown item 'nothing'"):
        kept.load("m").recommend(["nothing"])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0"}))
    with pytest.raises(InputError, match="damaged model m"):
        kept.load("m")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="damaged model m"):
        kept.load("m")


# -- tables and figures --------------------------------------------------------------------------------------


def curve(model: str, seed: int, size: int, loss: float, prediction: str | None = None) -> dict:
    metrics = {
        "non_embedding": size,
        "item_tables": 100,
        "training_flops": 6.0 * size,
        "trained_tokens": 10,
        "lowest_valid_loss": loss,
        "late_drop": 0.02 if seed else 0.0,
        "valid_ndcg@10": 0.1,
    }
    return {
        "name": "learning_curve",
        "data": {"name": "scaling-x"},
        "own_params": {"model": model},
        "metrics": metrics,
        "series": {"epoch": [1, 2]},
        "timings": {},
        "seed": seed,
        "kind": "measured",
        "label": "cpu",
        "profile": "grid",
        "time": "2026-01-01",
        "configuration": {"prediction": prediction} if prediction else {},
    }


def prediction() -> dict:
    numbers = {"floor": 5.0, "factor": 30.0, "exponent": 0.3, "predicted": 5.5, "low": None, "high": None}
    numbers |= {"without_low": 5.4, "without_high": 5.6}
    one = curve("none", 0, 1, 1.0)
    own = {"of": "w384d2", "size": 4000, "seeds": 1}
    return one | {
        "name": "prediction",
        "metrics": numbers,
        "own_params": own,
        "params_hash": "abc",
        "kind": "predicted",
    }


ROWS = [curve("w32d2", s, 1000, 6.0 + s / 10) for s in (0, 1)] + [curve("w64d4", 0, 2000, 5.8)]
LARGEST = curve("w384d2", 0, 4000, 5.0, "abc")


def test_findings_read_right_with_nothing_with_few_and_with_all():
    none = scaling.outcome([], "scaling-x")
    assert scaling_tables.findings([], none, "scaling-x") == ["- scaling-x: no run is committed yet."]
    few = "\n".join(scaling_tables.findings(ROWS, scaling.outcome(ROWS, "scaling-x"), "scaling-x"))
    assert "No law yet" in few
    assert "Fewer than three seeds: w32d2 (2), w64d4 (1)" in few
    barred = scaling.outcome([*ROWS, prediction()], "scaling-x")
    assert "w384d2 is not measured yet" in "\n".join(scaling_tables.findings(ROWS, barred, "scaling-x"))
    whole = [*ROWS, LARGEST]
    found = scaling.outcome([*whole, prediction()], "scaling-x")
    assert found["error"] == pytest.approx(0.5)
    assert "error +0.500 nats (+10.0%)" in "\n".join(scaling_tables.findings(whole, found, "scaling-x"))


def test_a_run_without_the_predictions_hash_does_not_count_as_predicted():
    stranger = curve("w384d2", 0, 4000, 5.0)
    assert scaling.outcome([*ROWS, stranger, prediction()], "scaling-x")["measured"] is None


def test_the_figure_shows_every_seed_and_hollow_what_is_predicted():
    figure = scaling_figures.scaling_curve(tables.table([*ROWS, LARGEST, prediction()]))
    marks = {trace.name: trace for trace in figure.data if trace.xaxis in (None, "x")}
    assert sorted(marks["width, committed"].y) == [5.0, 6.0, 6.1]
    assert list(marks["depth, committed"].y) == [5.8]
    assert marks["prediction of w384d2"].marker.symbol == "circle-open"
    assert "+10.0%" in figure.layout.title.text
    assert marks["law"].line.dash == "dash"


def test_the_figures_of_tuning_tell_whole_from_pruned():
    rows = pd.DataFrame(
        {
            "trial": [0, 1, 2],
            "state": ["complete", "pruned", "complete"],
            "valid_ndcg@10": [0.1, 0.05, 0.2],
            "learning_rate": [1e-4, 1e-1, 1e-2],
            "kind": "measured",
        }
    )
    history = scaling_figures.tuning_history(rows)
    assert {trace.name: len(trace.x) for trace in history.data} == {"complete": 2, "pruned": 1, "best": 2}
    parallel = scaling_figures.tuning_parallel(rows)
    assert [axis.label for axis in parallel.data[0].dimensions] == ["log10 learning_rate", "valid_ndcg@10"]
    shares = pd.DataFrame({"field": ["a", "b"], "share": [0.2, 0.8], "kind": "measured"})
    assert "b has 80%" in scaling_figures.tuning_importance(shares).layout.title.text


def test_the_full_profile_names_the_four_sizes_and_its_data_are_known():
    full = params.profile("03_scaling", "full")
    assert full["sizes"] == ["5m", "85m", "130m", "430m"]
    known = (ROOT / "params" / "datasets.yaml").read_text()
    assert f"\n{full['dataset']}:" in known
