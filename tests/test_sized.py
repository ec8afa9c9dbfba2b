"""Runs of notebook 03: what fits, what was tuned for these data, and models that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reclib import parameters, system
from reclib.config import DataConfig, InputError, TrainConfig, model_config
from reclib.cost import work
from reclib.data.prepare import prepare
from reclib.data.splits import leave_one_out
from reclib.experiments import scaling
from reclib.experiments.scaling import Tuned
from reclib.hardware import resolve
from reclib.train import fit as fit_module
from reclib.train import saving
from reclib.train.fit import fit

GIB = 2**30


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    for name in ("RECLIB_DATA", "RECLIB_RUNS", "RECLIB_RECORDS", "RECLIB_MODELS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture
def dataset():
    return prepare(
        DataConfig(dataset="synthetic", synthetic_users=40, synthetic_items=30, min_user=1, min_item=1)
    )


def asked(**changes):
    small = {"sizes": ["w32d1"], "epochs": 1, "batch_size": 8, "max_len": 20, "tuned": False}
    return parameters.build("03_scaling", parameters.profile("03_scaling", "smoke") | small | changes)


def test_a_catalogue_that_memory_does_not_allow_is_refused_before_anything_is_allocated(dataset):
    p = asked(sizes=["430m"])
    with pytest.raises(InputError, match=r"this does not fit: estimated .* GiB .*") as caught:
        scaling.demand_fit(p, dataset, leave_one_out(dataset), resolve("cpu"), "430m", room=GIB)
    assert "hidden_dim" in str(caught.value) or "smaller size" in str(caught.value)


def test_training_itself_refuses_what_does_not_fit_before_it_makes_a_model(dataset, monkeypatch):
    monkeypatch.setattr(work, "machine_bytes", lambda: GIB)
    monkeypatch.setattr(fit_module, "Bert4Rec", lambda config: pytest.fail("a model was made"))
    model = model_config("430m", num_items=dataset.num_items, max_len=20)
    with pytest.raises(InputError, match=r"this does not fit: estimated .* of 0\.95 usable; .*"):
        fit(model, dataset, TrainConfig(batch_size=8), resolve("cpu"))


def test_a_container_s_limit_counts_where_it_is_below_the_machine_s(tmp_path, monkeypatch):
    whole = work.machine_bytes()
    file = tmp_path / "memory.max"
    monkeypatch.setattr(work, "LIMITS", (file, tmp_path / "none"))
    for said, wanted in ((str(GIB), GIB), ("max", None), (str(2**62), None)):
        file.write_text(said + "\n")
        assert work.machine_bytes() == (wanted or max(whole, work.machine_bytes()))


def test_an_l4_trains_the_largest_named_size_at_the_full_profile():
    p = parameters.build("03_scaling", parameters.profile("03_scaling", "full"))
    model = model_config("430m")
    train = scaling.recipe(p, "430m", 0)
    lengths = np.random.default_rng(0).geometric(1 / 9.25, 20_000) + 4
    found = work.require_fit(model, train, lengths, 23 * 10**9, "bf16", "cuda")
    assert found.total < 23e9
    whole = parameters.build(
        "03_scaling", parameters.profile("03_scaling", "full") | {"micro_batch_size": 512}
    )
    larger = work.training_memory(model, scaling.recipe(whole, "430m", 0), lengths, "bf16", "cuda")
    assert larger.total > found.total, "that is what accumulation is for"


def test_tuned_settings_are_taken_for_their_size_and_data_only(dataset, root, monkeypatch):
    monkeypatch.setattr(system, "params", lambda: root / "params")
    by = {"study": "a-study", "trial": 3, "trials": 9, "time": "2026-01-01T00:00:00"}
    chosen = Tuned({"dropout": 0.33}, {"mask_prob": 0.55, "epochs": 99}, by)
    scaling.write_tuned("w32d1", dataset.name, dataset.fingerprint, chosen)
    monkeypatch.undo()
    p = asked()
    monkeypatch.setattr(system, "params", lambda: root / "params")
    assert scaling.configs(p, dataset, "w32d1", 0)[0].dropout == p.dropout
    from dataclasses import replace

    model, train = scaling.configs(replace(p, tuned=True), dataset, "w32d1", 0)
    assert (model.dropout, train.mask_prob, train.epochs) == (0.33, 0.55, 1)
    assert scaling.configs(replace(p, tuned=True), dataset, "w32d2", 0)[0].dropout == p.dropout
    assert scaling.title(p, dataset, "w32d1") == "w32d1"
    assert scaling.title(replace(p, tuned=True), dataset, "w32d1") == "w32d1 (tuned)"
    (row,) = scaling.settings(replace(p, tuned=True), dataset)
    assert (row["mask_prob"], row["from"]) == (0.55, "a-study, trial 3 of 9, 2026-01-01")
    scaling.write_tuned("w32d1", dataset.name, "0" * 64, chosen)
    with pytest.raises(InputError, match="tune anew"):
        scaling.configs(replace(p, tuned=True), dataset, "w32d1", 0)


def test_a_kept_model_recommends_what_the_trained_one_does(dataset):
    p = asked()
    one = scaling.train(p, dataset, leave_one_out(dataset), resolve("cpu"), "w32d1", 0)
    saving.save_model(one.trainer.model, one.trainer.config, dataset, "w32d1-synthetic", one.best())
    files = {file.name for file in (system.models() / "w32d1-synthetic").iterdir()}
    assert files == {"model.safetensors", "config.json", "manifest.json"}
    model = saving.load_model("w32d1-synthetic")
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
        saving.load_model("x")
    one = scaling.train(asked(), dataset, leave_one_out(dataset), resolve("cpu"), "w32d1", 0)
    folder = saving.save_model(one.trainer.model, one.trainer.config, dataset, "m", {})
    with pytest.raises(InputError, match="the history is empty"):
        saving.load_model("m").recommend([])
    with pytest.raises(InputError, match="unknown item 'nothing'"):
        saving.load_model("m").recommend(["nothing"])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0"}))
    with pytest.raises(InputError, match="damaged model m"):
        saving.load_model("m")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="damaged model m"):
        saving.load_model("m")
