"""Arms start from the same base, see the same batches, and are what they are called."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import smoke

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
def trained(dataset, tmp_path_factory):
    """Two seeds' bases, adapted by few arms at two learning rates; and the first by every arm at one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        rates = {"seeds": [0, 1], "learning_rates": [3e-3, 1e-2]}
        p = small(**rates, tasks=["next_period", "segment"], segment_share=0.6)
        periods, tasks = adaptation.tasks_of(p, dataset)
        bases = {seed: adaptation.train_base(p, dataset, periods, CPU, seed) for seed in p.seeds}
        runs = adaptation.adapt(p, bases, dataset, tasks[0], CPU)
        every = adaptation.adapt(small(arms=ARMS), {0: bases[0]}, dataset, tasks[0], CPU)
        by_arm = {run.arm: run for run in every}
        yield SimpleNamespace(p=p, periods=periods, tasks=tasks, bases=bases, runs=runs, by_arm=by_arm)


def test_all_arms_see_the_same_batches_on_equal_tokens(trained):
    pairs = [(arm, seed) for arm in trained.p.arms for seed in trained.p.seeds]
    assert [(run.arm, run.seed) for run in trained.runs] == pairs
    tokens = {arm: run.tokens for arm, run in trained.by_arm.items()}
    assert tokens.pop("none") == 0
    assert len(set(tokens.values())) == 1
    assert tokens["lora"] > 0
    trainers = [trained.by_arm[arm].trainer for arm in tokens]
    batches = [Epoch(t.histories, t.model.config, t.config, 0).step(0)[0] for t in trainers]
    for batch in batches:
        assert torch.equal(batch.items, batches[0].items)
        assert torch.equal(batch.targets, batches[0].targets)


def test_arms_are_what_they_are_called_and_only_full_moves_the_base(trained, dataset):
    runs, counted = trained.by_arm, adaptation.counts(small(arms=ARMS), dataset).metrics
    assert {arm: run.trained for arm, run in runs.items()} == {arm: counted[arm] for arm in ARMS}
    base = dict(trained.bases[0].model.named_parameters())
    for arm in set(ARMS) - {"none"}:
        model = runs[arm].trainer.model
        inner = model.twin if isinstance(model, AdaptedModel) else model
        moved = {name for name, q in inner.named_parameters() if not torch.equal(q, base[name])}
        assert moved == {"full": set(base), "bias": {"output_bias"}}.get(arm, set()), arm
    configs = {arm: runs[arm].trainer.model.configs[arm] for arm in (*CONTROLS, "head", "gated")}
    assert all((configs[arm].kind, configs[arm].control) == ("ilora", arm) for arm in CONTROLS)
    assert (configs["head"].targets, configs["gated"].kind) == (("head",), "gated")
    assert runs["fixed_gate"].trained == runs["lora"].trained < runs["ilora"].trained
    assert runs["none"].saved_bytes == 0 < runs["lora"].saved_bytes < runs["full"].saved_bytes


def test_the_first_seeds_validation_chooses_the_rate_of_all(trained, dataset):
    """Runs are loaded here, not trained again."""
    rates, of_base = trained.p.learning_rates, (trained.bases[0].model, dataset, trained.tasks[0], CPU, 0)
    for arm in ("full", "ilora", "head"):
        first, second = (run for run in trained.runs if run.arm == arm)
        trainers = [adaptation.train_arm(trained.p, arm, *of_base, rate)[0] for rate in rates]
        values = [trainer.progress.best_value for trainer in trainers]
        assert first.valid == max(values)
        assert first.learning_rate == second.learning_rate == rates[int(np.argmax(values))]


def test_new_items_start_from_their_neighbours(dataset):
    periods = splits.divide(dataset, (0.5, 0.25, 0.1), 4)
    new, known = 7, periods.known.copy()
    known[new] = False
    torch.manual_seed(0)
    model = Bert4Rec(model_config("nano", num_items=dataset.num_items, max_len=16))
    torch.nn.init.normal_(model.output_bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    beside = splits.neighbours(periods.adaptation.train, known)[new]
    assert adaptation.start_new_items(model, periods._replace(known=known)) >= 1
    for name in ("output_weight", "output_bias"):
        table = dict(model.named_parameters())[name]
        torch.testing.assert_close(table[new], before[name][beside].mean(0))
        kept = [item for item in range(dataset.num_items + 2) if item > dataset.num_items or known[item]]
        assert torch.equal(table[kept], before[name][kept])


def test_results_average_over_targets_then_seeds(trained, dataset):
    task, runs = trained.tasks[0], trained.runs
    runs = [*runs, adaptation.pairwise_counts(dataset, trained.periods, task)]
    results = adaptation.accuracy(dataset, task, runs, 200)
    means = {r.params["model"]: r.metrics for r in results if r.seed is None}
    seeds = [r.metrics["ndcg@10"] for r in results if r.seed is not None and r.params["model"] == "ilora"]
    mean = means["ilora"]
    assert mean["ndcg@10"] == pytest.approx(np.mean(seeds))
    assert mean["ndcg@10_low"] <= mean["ndcg@10"] <= mean["ndcg@10_high"]
    assert means["full"]["trained_share"] == 1
    assert means["pairwise_counts"]["seeds"] == means["pairwise_counts"]["trained"] == 0
    compared = adaptation.comparisons(dataset, task, runs, "ilora", "gate_comparison")
    lora = next(r for r in compared if (r.params["model"], r.params["metric"]) == ("lora", "ndcg@10"))
    assert lora.metrics["difference"] == pytest.approx(means["lora"]["ndcg@10"] - mean["ndcg@10"])
    assert (lora.name, lora.metrics["seeds"]) == ("gate_comparison", 2)
    counted, *sizes = adaptation.described(trained.periods, trained.tasks)
    assert sum(counted.metrics[f"{part}_interactions"] for part in splits.PARTS) == dataset.num_interactions
    assert [size.params["task"] for size in sizes] == ["next_period", "segment"]


def test_gates_are_those_that_the_ranking_uses(trained, dataset):
    task = trained.tasks[0]
    rows = task.split.test
    ilora, static = (trained.by_arm[arm].trainer for arm in ("ilora", "static_gate"))
    weights = adaptation.expert_weights(ilora, rows)
    assert weights.shape == (len(rows.targets), trained.p.num_experts)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert adaptation.expert_weights(static, rows).std(axis=0).max() < 1e-6
    fifth = Histories(rows.histories.items, rows.histories.starts[5:6], rows.histories.ends[5:6])
    alone = adaptation.expert_weights(ilora, Evaluation(fifth, rows.targets[5:6]))
    np.testing.assert_allclose(alone[0], weights[5], atol=1e-5)
    gates = adaptation.gates(dataset, trained.periods, task, trained.runs)
    assert (gates.metrics["users"], gates.seed) == (len(gates.series["expert 1"]), 0)
    assert "NDCG@10 minus that of lora" in gates.series


def test_the_gate_may_read_a_causal_model_of_the_same_past(trained, dataset):
    periods, task, base = trained.periods, trained.tasks[0], trained.bases[1]
    p = small(representation="causal_state", arms=["none", "lora", "ilora", "static_gate"], seeds=[1])
    reader = adaptation.train_reader(p, dataset, periods, CPU, 1)
    assert reader.config.causal
    assert adaptation.train_reader(small(), dataset, periods, CPU, 1) is None
    counted = adaptation.counts(p, dataset).metrics
    runs = adaptation.adapt(p, {1: base}, dataset, task, CPU, {1: reader})
    by_arm = {run.arm: run for run in runs}
    assert base_hash(by_arm["ilora"].trainer.model.reader("ilora")) == base_hash(reader)
    assert by_arm["static_gate"].trainer.model.reader("static_gate") is None
    assert by_arm["ilora"].tokens == by_arm["lora"].tokens
    results = adaptation.accuracy(dataset, task, runs, 50)
    shares = {r.params["model"]: r.metrics["trained_share"] for r in results if r.seed is None}
    assert shares["ilora"] == pytest.approx(counted["ilora"] / counted["base"])  # the reader is no part of it
    rows = speed.adapter_grid(p, base.model, dataset, CPU, reader)
    assert {row.measured.status for row in rows if row.settings["compile_mode"] == "off"} == {"ok"}


def test_implanted_items_follow_the_rule_of_user_and_item_before(dataset):
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
