"""What a newcomer calls: the names of `reclib`, the README's ten lines, `fit` from the shell."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, python, refused

import reclib
from reclib import Bert4Rec, DataConfig, ModelConfig, add_ilora, evaluate, fit, load, plan, prepare
from reclib.data.dataset import evaluation
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import statistics
from reclib.model.ilora import AdaptedModel


@pytest.fixture(scope="module")
def data():
    return synthetic_dataset(40, 12, 6.0, 0)


@pytest.fixture(scope="module")
def model(data):
    return fit(data, "nano", gpu="cpu", epochs=2, max_len=16, batch_size=8)


def test_importing_the_package_loads_nothing_and_its_names_are_listed():
    code = "import sys, reclib; print([m for m in sys.modules if m == 'torch' or m.startswith('reclib.')])"
    code += "; reclib.ModelConfig, reclib.plan; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "[]\nFalse\n"
    for name in reclib.__all__:
        assert name in dir(reclib)
        assert callable(getattr(reclib, name)), name
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = reclib.fitt


def code_below(line: str, file: str) -> str:
    """Return the indented block below a line of a document."""
    block = re.search(rf"^{line}[^\n]*\n\n((?:    .*\n|\n)+)", (ROOT / file).read_text(), flags=re.MULTILINE)
    assert block is not None
    return re.sub(r"^    ", "", block[1], flags=re.MULTILINE)


def write_ratings(file: Path) -> None:
    draw = random.Random(0)
    rows = [f"u{u},i{draw.randrange(20)},{1577836800 + t}" for u in range(60) for t in range(8)]
    file.write_text("user,item,time\n" + "\n".join(rows) + "\n")


def test_several_files_become_one_catalogue(project):
    write_ratings(project / "beauty.csv")
    write_ratings(project / "books.csv")
    code = code_below("Several files become one catalogue", "docs/data.md")
    done = python("-c", code, cwd=project)
    assert done.returncode == 0, done.stderr
    alone, both = (prepare(DataConfig(dataset=str(project / name))) for name in ("books.csv", "union.txt"))
    assert (both.num_users, both.num_items) == (2 * alone.num_users, 2 * alone.num_items)
    part = evaluation(both, "test")
    assert statistics.by_source(both.item_keys[part.targets]).labels == ["beauty", "books"]


def test_the_ten_lines_of_the_readme_run(project):
    write_ratings(project / "ratings.csv")
    code = code_below("## From a CSV", "README.md")
    done = python("-c", code, cwd=project)  # whose root the fixture has set
    assert done.returncode == 0, done.stderr
    first, *items = done.stdout.splitlines()
    assert re.fullmatch(r"HR@10 0\.\d{3}, NDCG@10 0\.\d{3}, MRR 0\.\d{3}", first)
    assert len(items) == 5
    assert all(re.fullmatch(r"i\d+ i\d+", line) for line in items)


def test_histories_are_ids_numbers_or_titles_and_what_is_left_is_returned(model):
    by_id = model.recommend(["1", "2", "3"], k=4)
    assert len({item.key for item in by_id} - {"1", "2", "3"}) == 4
    for same in ([1, 2, 3], np.array([1, 2, 3]), ("1", 2, "3")):
        assert model.recommend(same, k=4) == by_id
    named = reclib.train.saving.Recommender(model.model, model.keys, [f"Film {k}" for k in model.keys], {})
    assert [i.key for i in named.recommend(["film 1", "Film 2", 3], k=4)] == [i.key for i in by_id]
    with pytest.warns(UserWarning, match="2 items are not in the history"):
        assert {item.key for item in model.recommend(model.keys[:10], k=5)} == set(model.keys[10:])
    with pytest.warns(UserWarning, match="0 items"):
        assert model.recommend(model.keys, k=5) == []
    twice = reclib.train.saving.Recommender(model.model, model.keys, ["Same"] * 12, {})
    refused("k is 0", model.recommend, ["1"], 0)
    refused("expected a list of items, oldest first", model.recommend, {"1", "2"}, 5)
    refused("the history is empty", model.recommend, [], 5)
    refused("unknown item 'nothing'", model.recommend, ["nothing"], 5)
    refused("did you mean 'Film 1", named.recommend, ["film 1l"], 5)
    refused("that of 12 items: give an id, such as 1, 2", twice.recommend, ["same"], 5)


def test_a_model_is_evaluated_adapted_and_planned(data, model):
    values = evaluate(model, data)
    assert 0 < values["mrr"] <= values["hr@10"] <= 1
    assert evaluate(model.model, data) == values
    assert evaluate(model, data, remove_seen=False) != values
    refused("items are not those of synthetic", evaluate, model, synthetic_dataset(40, 13, 6.0, 0))
    own = Bert4Rec(ModelConfig(num_items=12, hidden_dim=8, num_heads=1, max_len=16))
    adapted = add_ilora(own, rank=4, experts=2)
    assert isinstance(adapted, AdaptedModel)
    trained = fit(data, model=adapted, gpu="cpu", epochs=1, batch_size=8)
    assert trained.model is adapted
    assert len(trained.recommend([1, 2], k=3)) == 3
    refused(r"unknown setting 'epoch' \(did you mean 'epochs'", fit, data, epoch=1)
    assert plan("5m", "l4", price=1.0).fits
    refused("stands for v100-16, v100-32", plan, "5m", "v100")


def test_fit_leaves_a_model_that_recommends_from_the_shell(study, project):
    options = ["--dataset", "synthetic", "--size", "nano", "--gpu", "cpu", "--out", "runs/mine"]
    done = study("fit", *options, "-p", "epochs", "1", "-p", "clip_norm", "null")
    assert done.returncode == 0, done.stderr
    command = done.stderr.splitlines()[-1].removeprefix("next: python -m reclib ").split()
    listed = study(*command, "-k", "3")
    assert [len(line.split("\t")) for line in listed.stdout.splitlines()] == [2, 2, 2]
    assert load(project / "runs/mine").recommend(command[2:], 3)[0].key == listed.stdout.split("\t")[0]
    wrong = study("recommend", "runs/mine", "nothing")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
