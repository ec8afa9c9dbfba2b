"""Lists of a base and its adapters after any history, and the history itself: searched, cut, put in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from lineups import CPU, asked, trained
from small_models import scores_after
from spread import dataset  # noqa: F401  # a fixture

from reclib import system
from reclib.config import InputError, TrainConfig
from reclib.experiments import explore
from reclib.train import saving


@pytest.fixture(scope="module")
def lineup(dataset, tmp_path_factory):  # noqa: F811
    yield from trained(dataset, tmp_path_factory.getbasetemp() / "lineup")


@pytest.fixture
def history(lineup):
    return explore.first_history(asked(), lineup)[1]


def test_a_list_is_that_of_the_models_scores_without_what_was_seen(lineup, history):
    found = explore.ranks(lineup, "base", history)
    best = explore.top(found, 5)
    assert not set(best) & set(history)
    assert found[best].tolist() == [1, 2, 3, 4, 5]
    assert not found[list(history)].any()
    scores = scores_after(lineup.models["base"], history)
    scores[torch.tensor(history) - 1] = -torch.inf
    assert best == (scores.topk(5).indices + 1).tolist()


def test_the_gate_is_of_the_history(lineup, history):
    weights = explore.gate(lineup, history)
    assert weights.sum() == pytest.approx(1)
    assert weights.shape == (4,)
    assert not np.allclose(weights, explore.gate(lineup, history[:2]), atol=1e-6)
    assert lineup.gates.shape[1] == 4


def test_a_history_is_handed_on_and_read_back(lineup, history):
    key = list(lineup.users)[1]
    given = yaml.safe_load(explore.as_parameters(lineup, key, history[:3]))
    assert explore.first_history(asked(**given), lineup) == (key, history[:3])
    for wrong, said in [({"user": "nobody"}, "not in the last"), ({"history": ["x"]}, "unknown item 'x'")]:
        with pytest.raises(InputError, match=said):
            explore.first_history(asked(**wrong), lineup)


def test_a_kept_model_is_used_where_there_is_one(lineup, dataset):  # noqa: F811
    assert explore.kept_model("auto", dataset) is None
    with pytest.raises(InputError, match="kept_model='mine': no masked model"):
        explore.kept_model("mine", dataset)
    base = lineup.models["base"]
    folder = saving.save_model(base, TrainConfig(), dataset, "mine", {})
    try:
        assert folder.parent == system.models()
        assert explore.kept_model("auto", dataset) == "mine"
        assert explore.kept_model("none", dataset) is None
        found = explore.lineup(asked(), dataset, CPU)
        assert "mine, kept under models/" in found.description
        assert {user.target for user in found.users.values()} == {None}  # it may have learnt them
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
