"""Arms start from the same base, see the same batches, and are what they are called."""

import numpy as np
import pytest
import torch
from conftest import smoke
from spread import dataset  # noqa: F401  # a fixture

from reclib import hardware, parameters
from reclib.config import CONTROLS, model_config
from reclib.data import splits
from reclib.data.batches import Epoch
from reclib.data.dataset import Evaluation, Histories
from reclib.experiments import adaptation, speed
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, base_hash
from reclib.parameters import ILora

CPU = hardware.resolve("cpu")
ARMS = parameters.profile("05_ilora", "full")["arms"]
FEW = ["none", "full", "lora", "ilora", "head"]
SMALL = {"arms": FEW, "past_share": 0.5, "size": "nano", "max_len": 16, "batch_size": 32, "epochs": 1}


def small(**changes: object) -> ILora:
    return smoke("05_ilora", **(SMALL | changes))


@pytest.fixture(scope="module")
def experiment(dataset, tmp_path_factory):  # noqa: F811
    """Two seeds' bases, adapted by few arms at two learning rates; and the first by every arm at one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        rates = {"seeds": [0, 1], "learning_rates": [3e-3, 1e-2]}
        p = small(**rates, tasks=["next_period", "segment"], segment_share=0.6)
        whole, tasks = adaptation.tasks_of(p, dataset)
        bases = {seed: adaptation.train_base(p, dataset, whole, CPU, seed) for seed in p.seeds}
        runs = adaptation.adapt(p, bases, dataset, tasks[0], CPU)
        every = adaptation.adapt(small(arms=ARMS), {0: bases[0]}, dataset, tasks[0], CPU)
        yield p, whole, tasks, bases, runs, every


def test_all_arms_see_the_same_batches_on_equal_tokens(experiment):
    p, _, _, _, runs, every = experiment
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for arm in p.arms for seed in p.seeds]
    tokens = {run.arm: run.tokens for run in every}
    assert tokens.pop("none") == 0
    assert len(set(tokens.values())) == 1
    assert tokens["lora"] > 0
    trainers = [run.trainer for run in every if run.arm != "none"]
    batches = [Epoch(one.histories, one.model.config, one.config, 0).step(0)[0] for one in trainers]
    for batch in batches:
        assert torch.equal(batch.items, batches[0].items)
        assert torch.equal(batch.targets, batches[0].targets)


def test_arms_are_what_they_are_called_and_only_full_moves_the_base(experiment, dataset):  # noqa: F811
    bases, every = experiment[3], experiment[-1]
    of = {run.arm: run for run in every}
    counted = adaptation.counts(small(arms=ARMS), dataset).metrics
    assert {arm: run.trained for arm, run in of.items()} == {arm: counted[arm] for arm in ARMS}
    base = dict(bases[0].model.named_parameters())
    for arm in set(ARMS) - {"none"}:
        model = of[arm].trainer.model
        inner = model.twin if isinstance(model, AdaptedModel) else model
        moved = {name for name, q in inner.named_parameters() if not torch.equal(q, base[name])}
        assert moved == {"full": set(base), "bias": {"output_bias"}}.get(arm, set()), arm
    configs = {arm: of[arm].trainer.model.configs[arm] for arm in (*CONTROLS, "head", "gated")}
    assert all((configs[arm].kind, configs[arm].control) == ("ilora", arm) for arm in CONTROLS)
    assert (configs["head"].targets, configs["gated"].kind) == (("head",), "gated")
    assert of["fixed_gate"].trained == of["lora"].trained < of["ilora"].trained
    assert of["none"].saved_bytes == 0 < of["lora"].saved_bytes < of["full"].saved_bytes


def test_the_first_seeds_validation_chooses_the_rate_of_all(experiment, dataset):  # noqa: F811
    """Runs are loaded here: each is trained once, whoever asks."""
    p, _, tasks, bases, runs, _ = experiment
    for arm in ("full", "ilora", "head"):
        first, second = (run for run in runs if run.arm == arm)
        given = (arm, bases[0].model, dataset, tasks[0], CPU, 0)
        tried = [adaptation.train_arm(p, *given, rate)[0].progress.best_value for rate in p.learning_rates]
        assert first.valid == max(tried)
        assert first.learning_rate == second.learning_rate == p.learning_rates[int(np.argmax(tried))]


def test_new_items_start_from_their_neighbours(dataset):  # noqa: F811
    whole = splits.divide(dataset, (0.5, 0.25, 0.1), 4)
    new, known = 7, whole.known.copy()
    known[new] = False
    torch.manual_seed(0)
    model = Bert4Rec(model_config("nano", num_items=dataset.num_items, max_len=16))
    torch.nn.init.normal_(model.output_bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    beside = splits.neighbours(whole.adaptation.train, known)[new]
    assert adaptation.start_new_items(model, whole._replace(known=known)) >= 1
    for name in ("output_weight", "output_bias"):
        table = dict(model.named_parameters())[name]
        torch.testing.assert_close(table[new], before[name][beside].mean(0))
        kept = [item for item in range(dataset.num_items + 2) if item > dataset.num_items or known[item]]
        assert torch.equal(table[kept], before[name][kept])


def test_results_average_over_targets_then_seeds(experiment, dataset):  # noqa: F811
    _, whole, tasks, _, runs, _ = experiment
    counts = adaptation.pairwise_counts(dataset, whole, tasks[0])
    found = adaptation.accuracy(dataset, tasks[0], [*runs, counts], 200)
    means = {r.params["model"]: r.metrics for r in found if r.seed is None}
    seeds = [r.metrics["ndcg@10"] for r in found if r.seed is not None and r.params["model"] == "ilora"]
    mean = means["ilora"]
    assert mean["ndcg@10"] == pytest.approx(np.mean(seeds))
    assert mean["ndcg@10_low"] <= mean["ndcg@10"] <= mean["ndcg@10_high"]
    assert means["full"]["trained_share"] == 1
    assert means["pairwise_counts"]["seeds"] == means["pairwise_counts"]["trained"] == 0
    compared = adaptation.comparisons(dataset, tasks[0], [*runs, counts], "ilora", "gate_comparison")
    lora = next(r for r in compared if (r.params["model"], r.params["metric"]) == ("lora", "ndcg@10"))
    assert lora.metrics["difference"] == pytest.approx(means["lora"]["ndcg@10"] - mean["ndcg@10"])
    assert (lora.name, lora.metrics["seeds"]) == ("gate_comparison", 2)
    periods, *sizes = adaptation.described(whole, tasks)
    assert sum(periods.metrics[f"{part}_interactions"] for part in splits.PARTS) == dataset.num_interactions
    assert [size.params["task"] for size in sizes] == ["next_period", "segment"]


def test_gates_are_those_that_the_ranking_uses(experiment, dataset):  # noqa: F811
    p, whole, tasks, _, runs, every = experiment
    rows = tasks[0].split.test
    of = {run.arm: run for run in every}
    weights = {arm: adaptation.expert_weights(of[arm].trainer, rows) for arm in ("ilora", "static_gate")}
    assert weights["ilora"].shape == (len(rows.targets), p.num_experts)
    np.testing.assert_allclose(weights["ilora"].sum(axis=1), 1, atol=1e-5)
    assert weights["static_gate"].std(axis=0).max() < 1e-6
    five = Histories(rows.histories.items, rows.histories.starts[5:6], rows.histories.ends[5:6])
    alone = adaptation.expert_weights(of["ilora"].trainer, Evaluation(five, rows.targets[5:6]))
    np.testing.assert_allclose(alone[0], weights["ilora"][5], atol=1e-5)
    gates = adaptation.gates(dataset, whole, tasks[0], runs)
    assert (gates.metrics["users"], gates.seed) == (len(gates.series["expert 1"]), 0)
    assert "NDCG@10 minus that of lora" in gates.series


def test_the_gate_may_read_a_causal_model_of_the_same_past(experiment, dataset):  # noqa: F811
    _, whole, tasks, bases, _, _ = experiment
    p = small(representation="causal_state", arms=["none", "lora", "ilora", "static_gate"], seeds=[1])
    readers = {1: adaptation.train_reader(p, dataset, whole, CPU, 1)}
    assert readers[1].config.causal
    assert adaptation.train_reader(small(), dataset, whole, CPU, 1) is None
    counted = adaptation.counts(p, dataset).metrics
    runs = adaptation.adapt(p, {1: bases[1]}, dataset, tasks[0], CPU, readers)
    of = {run.arm: run for run in runs}
    model = of["ilora"].trainer.model
    assert base_hash(model.reader("ilora")) == base_hash(readers[1])
    assert of["static_gate"].trainer.model.reader("static_gate") is None
    assert of["ilora"].tokens == of["lora"].tokens
    results = adaptation.accuracy(dataset, tasks[0], runs, 50)
    shares = {r.params["model"]: r.metrics["trained_share"] for r in results if r.seed is None}
    assert shares["ilora"] == pytest.approx(counted["ilora"] / counted["base"])  # the reader is no part of it
    rows = speed.adapter_grid(p, bases[1].model, dataset, CPU, readers[1])
    assert {row.measured.status for row in rows if row.settings["compile_mode"] == "off"} == {"ok"}


def test_implanted_items_follow_the_rule_of_user_and_item_before(dataset):  # noqa: F811
    p = small(tasks=["next_period"])
    periods, _ = adaptation.tasks_of(p, dataset)
    rule = adaptation.rule_of(dataset, periods, per_side=30)
    changed = adaptation.implant(dataset, periods, rule, 0.5)
    later = dataset.times >= periods.about["points"][0]
    differs = changed.items != dataset.items
    assert not differs[~later].any()
    assert differs.sum() > 100
    assert changed.fingerprint != dataset.fingerprint
    assert adaptation.implant(dataset, periods, rule, 0.5).fingerprint == changed.fingerprint
    known = adaptation.ceiling(changed, adaptation.tasks_of(p, changed)[1][0], rule, 0.5).metrics
    assert known["the rule"] > known["popularity"]

    user = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    past = np.zeros((dataset.num_users, dataset.num_items + 1))
    past[user[~later], dataset.items[~later]] = 1
    left, _, right = np.linalg.svd(past, full_matrices=False)
    items = right[1] > np.median(right[1][past.any(axis=0)])
    people = left[:, 2] > np.median(left[past.any(axis=1), 2])
    assert not differs[~past.any(axis=1)[user]].any()  # nothing is known of users without a past
    places = np.flatnonzero(differs)
    combined = items[changed.items[places - 1]] ^ people[user[places]]
    agree = items[changed.items[places]] == combined  # up to the signs of two singular vectors
    assert agree.all() or not agree.any()
