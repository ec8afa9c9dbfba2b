"""The prior that counts: its entries against a brute-force count, its gradients, and what is saved of it."""

import math

import numpy as np
import pytest
import torch
from conftest import refused
from small_models import NUM_ITEMS, Stop, histories, small_model, stop_at, worst_difference

from reclib import hardware
from reclib.config import DataConfig, TrainConfig, changed, model_config
from reclib.data.batches import Epoch
from reclib.data.dataset import Evaluation, Histories
from reclib.data.prepare import prepare, synthetic_dataset
from reclib.data.splits import leave_one_out
from reclib.evaluate import baselines, metrics
from reclib.evaluate.baselines import CountPrior
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import add_ilora
from reclib.train import saving
from reclib.train.fit import PRIOR_WEIGHTS, fine_tune, fit, keep, rank_targets
from reclib.train.losses import batch_loss
from reclib.train.saving import Recommender

LENGTHS = [9, 4, 12, 7, 3, 8, 5, 6, 12, 2]
# Row and column scales are 1: in a prior they are those of the whole counts.
COUNTS = {"window": 3, "backward": 0.5, "row_power": 0.0, "column_power": 0.0, "decay": 0.7, "last": 4}


def prior_of(data: Histories) -> CountPrior:
    return CountPrior.from_counts(baselines.fit_pairwise_counts(data, NUM_ITEMS, **COUNTS), 0.3)


def test_the_prior_of_a_target_counts_every_history_but_its_own():
    data = histories(LENGTHS)
    prior = prior_of(data)
    for causal in (False, True):
        model = small_model(causal=causal)
        objective = "next_item" if causal else "cloze"
        train = TrainConfig(batch_size=len(LENGTHS), mask_prob=0.4, objective=objective)
        epoch = Epoch(data, model, train, 0, prior=prior)
        (batch,), samples = epoch.step(0), epoch.samples(0)
        priors = np.zeros((len(batch.targets), NUM_ITEMS))
        priors[batch.prior_rows, batch.prior_columns] = batch.prior_values
        wanted = {}
        starts = np.cumsum(samples.lengths) - samples.lengths
        for start, length, user in zip(starts, samples.lengths, epoch.users, strict=True):
            others = np.delete(np.arange(len(LENGTHS)), user)
            rest = Histories(data.items, data.starts[others], data.ends[others])
            counts = baselines.fit_pairwise_counts(rest, NUM_ITEMS, **COUNTS)
            for place in np.flatnonzero(samples.is_target[start : start + length]):
                end = data.starts[user] + place + int(causal)
                past = Histories(data.items, data.starts[[user]], np.array([end]))
                ((_, scores),) = counts.scores(Evaluation(past, np.ones(1, np.int32)))
                target = int(samples.labels[start + place])
                wanted.setdefault(target, []).append(np.log1p(scores[0].numpy() / 0.3))
        seen = 0
        for slot, target in enumerate(batch.targets.tolist()):
            if target > 0:  # the others fill the bucket
                assert min(np.abs(priors[slot] - row).max() for row in wanted[target]) < 2e-4
                seen += int((priors[slot] > 0).sum())
        assert seen > 100
        assert not priors[batch.num_targets :].any()


def test_every_route_has_the_plain_gradients_and_scale_zero_is_the_network_alone():
    data, config = histories(LENGTHS), small_model()
    prior = prior_of(data)

    def gradients(route: str, scale: float | None, micro: int | None = None) -> tuple[float, dict]:
        torch.manual_seed(1)
        model = Bert4Rec(config).double()
        train = TrainConfig(batch_size=len(LENGTHS), mask_prob=0.4, loss=route, micro_batch_size=micro)
        if scale is not None:
            model.prior = CountPrior(prior.state_dict())
            model.prior.scale.data = torch.tensor(scale, dtype=torch.float64)
        micros = Epoch(data, config, train, 0, prior=model.prior).step(0)
        targets = sum(batch.num_targets for batch in micros)
        total = sum(batch_loss(model, batch, train, targets) for batch in micros)
        total.backward()
        return total.item(), {name: p.grad for name, p in model.named_parameters()}

    plain_loss, plain = gradients("plain", 0.8)
    assert plain["prior.scale"].abs() > 1e-3
    for route, micro in (("inplace", None), ("chunked", None), ("inplace", 2), ("chunked", 5)):
        loss, other = gradients(route, 0.8, micro)
        assert math.isclose(loss, plain_loss, rel_tol=1e-7)
        assert worst_difference(other, plain) < 1e-6
    (alone_loss, alone), (loss, other) = gradients("inplace", None), gradients("inplace", 0.0)
    assert loss == alone_loss
    assert all(torch.equal(other[name], gradient) for name, gradient in alone.items())


def test_ranking_adds_the_prior_and_a_saved_model_keeps_it(tmp_path):
    data, config = histories(LENGTHS), small_model()
    model = Bert4Rec(config).eval()
    part = Evaluation(data, np.ones(len(LENGTHS), dtype=np.int32))

    def ranked(model: Bert4Rec) -> tuple[np.ndarray, torch.Tensor]:
        pieces = [(users, s.clone()) for users, s in metrics.model_scores(model, part, torch.device("cpu"))]
        return np.concatenate([users for users, _ in pieces]), torch.cat([s for _, s in pieces])

    order, alone = ranked(model)
    model.prior = prior_of(data)
    model.prior.scale.data.fill_(0.6)
    _, both = ranked(model)
    rows, columns, values = model.prior.for_histories(data, order)
    alone[rows, columns] += 0.6 * torch.from_numpy(values)
    assert torch.allclose(both, alone, atol=1e-6)
    assert len(values) > 50

    saving.save_checkpoint(tmp_path, "kept", saving.unique_tensors(model), {})
    kept = Bert4Rec(config).eval()
    saving.load_unique(kept, saving.load_checkpoint(tmp_path / "kept")[0])
    assert torch.equal(ranked(kept)[1], both)


def test_a_run_with_a_prior_resumes_to_the_same_bits_and_is_adapted_and_tuned(tmp_path, monkeypatch):
    data = synthetic_dataset(num_users=61, num_items=NUM_ITEMS, mean_len=9.0, seed=0)
    train = TrainConfig(prior="counts", epochs=3, batch_size=16, eval_every=1, checkpoint_seconds=0.0)
    config, cpu = changed(small_model(), dropout=0.1), hardware.resolve("cpu")
    whole = fit(config, data, train, cpu, tmp_path / "whole")

    with pytest.raises(Stop):
        fit(config, data, train, cpu, tmp_path / "parts", stop_at(6))
    assert saving.latest(tmp_path / "parts").name == "step-5"
    for other in (changed(config, hidden_dim=64), changed(config, num_items=NUM_ITEMS + 1)):
        refused("is of another run: model", fit, other, data, train, cpu, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(CountPrior, "chosen", lambda *_: pytest.fail("it is in the checkpoint"))
        parts = fit(config, data, train, cpu, tmp_path / "parts")
    kept = saving.unique_tensors(whole.model)
    assert any(name.startswith(saving.PRIOR) for name in kept)
    assert all(torch.equal(value, kept[name]) for name, value in saving.unique_tensors(parts.model).items())

    folder = keep(whole, data, tmp_path / "whole")
    loaded, in_memory = saving.load_model(folder), Recommender.from_dataset(whole.model, data, {})
    assert loaded.recommend(loaded.keys[:3]) == in_memory.recommend(loaded.keys[:3])
    more = changed(train, epochs=1)
    tuned = fine_tune(loaded.model, data, more, cpu)
    assert not torch.equal(tuned.model.prior.scale, kept["prior.scale"])
    trained = fine_tune(add_ilora(saving.load_model(folder)), data, more, cpu)
    assert torch.equal(trained.model.prior.scale, kept["prior.scale"])
    adapter = saving.save_adapter(trained.model, tmp_path / "adapter")
    again = saving.load_adapter(saving.load_model(folder).model, adapter)
    assert metrics.evaluate(trained.model, data) == metrics.evaluate(again, data)


def test_the_scale_of_a_trained_prior_is_the_one_that_ranks_validation_best_and_is_found_again(tmp_path):
    dataset = prepare(DataConfig(dataset="synthetic", synthetic_users=60, synthetic_items=40))
    train = TrainConfig(prior="counts", epochs=2, batch_size=16, eval_every=1)
    model = model_config("nano", num_items=dataset.num_items, max_len=20)
    trainer = fit(model, dataset, train, hardware.resolve("cpu"), tmp_path)
    kept, _ = saving.load_checkpoint(tmp_path / "best")
    chosen, learned = float(trainer.model.prior.scale.detach()), float(kept["prior.scale"])
    chosen_weight = round(chosen / learned * 2) / 2
    assert chosen / learned == pytest.approx(chosen_weight)
    valid, values = leave_one_out(dataset).valid, {}
    for weight in PRIOR_WEIGHTS:
        trainer.model.prior.scale.data.fill_(learned * weight)
        values[weight] = metrics.summary(rank_targets(trainer, valid).ranks)["ndcg@10"]
    assert values[chosen_weight] == max(values.values())
    again = fit(model, dataset, train, hardware.resolve("cpu"), tmp_path)  # finished: loaded, not trained
    assert float(again.model.prior.scale.detach()) == chosen
