"""Training a model that is there further: whole, in part, or by its adapter."""

from __future__ import annotations

import math

import pytest
import torch

from reclib import hardware
from reclib.config import AdapterConfig, InputError, TrainConfig, changed, model_config
from reclib.data.prepare import synthetic_dataset
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, base_hash
from reclib.train import saving
from reclib.train.fit import Options, fine_tune, fit
from reclib.train.trainer import make_optimizer

CPU = hardware.resolve("cpu")
DATASET = synthetic_dataset(40, 30, 8.0, 0)
TRAIN = TrainConfig(batch_size=16, epochs=4, eval_every=2, learning_rate=1e-2, lr_warmup_steps=1)
SHAPE = model_config("nano", num_items=DATASET.num_items, max_len=12, dropout=0.1)


def base(seed: int = 0) -> Bert4Rec:
    torch.manual_seed(seed)
    return Bert4Rec(SHAPE)


def adapted(seed: int = 0, **changes: object) -> AdaptedModel:
    found = AdaptedModel(base(seed))
    torch.manual_seed(3)
    found.add("x", AdapterConfig(**({"kind": "ilora", "rank": 4, "num_experts": 2} | changes)))
    return found


def test_checkpoints_hold_the_adapter_and_its_gate_alone(tmp_path):
    trainer = fine_tune(adapted(), DATASET, TRAIN, CPU, tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters." in name or name.startswith("gates.") for name in trained)
    for name in ("best", f"step-{trainer.total_steps}"):
        tensors, state = saving.load_checkpoint(tmp_path / name)
        weights = {key for key in tensors if not key.startswith(("optimizer.", "random."))}
        assert {key.removeprefix("model.") for key in weights} == trained
        assert state["identity"]["origin"]["base_sha256"] == base_hash(base())


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, tmp_path):
    def new() -> Bert4Rec | AdaptedModel:
        return base() if whole else adapted(dropout=0.1)

    class Stop(Exception):
        pass

    def stop(stats):
        if stats.step == 5:
            raise Stop

    reference = fine_tune(new(), DATASET, TRAIN, CPU)
    often = changed(TRAIN, checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        fine_tune(new(), DATASET, often, CPU, tmp_path, Options(on_step=stop))
    again = fine_tune(new(), DATASET, TRAIN, CPU, tmp_path)
    finished = fine_tune(new(), DATASET, TRAIN, CPU, tmp_path)
    for found in (again, finished):
        for one, other in zip(reference.model.parameters(), found.model.parameters(), strict=True):
            assert torch.equal(one, other)
    names = ("train_loss", "ndcg@10", "mrr")
    rows = [[row[name] for row in t.progress.history for name in names] for t in (reference, again)]
    assert rows[0] == rows[1]
    assert not math.isinf(again.progress.best_value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: adapted(seed=1), "origin.base_sha256 is"),
        (lambda: adapted(alpha=3.0), "origin.adapter is"),
        (lambda: adapted(gate_learning_rate=0.3), "origin.adapter is"),
        (base, "origin.trained is"),
    ],
)
def test_a_checkpoint_of_another_origin_is_refused(other, said, tmp_path):
    fine_tune(adapted(), DATASET, TRAIN, CPU, tmp_path)
    with pytest.raises(InputError, match="of another run") as error:
        fine_tune(other(), DATASET, TRAIN, CPU, tmp_path)
    assert said in str(error.value)


def test_a_checkpoint_of_a_new_model_is_not_gone_on_with(tmp_path):
    trained = fit(SHAPE, DATASET, TRAIN, CPU, tmp_path)
    with pytest.raises(InputError, match=r"origin\.base_sha256 is None there"):
        fine_tune(trained.model, DATASET, TRAIN, CPU, tmp_path)


def test_the_gate_has_a_rate_of_its_own():
    found = adapted(gate_learning_rate=0.25)
    shares = {
        id(p): group.get("rate_share", 1.0)
        for group in make_optimizer(found, TRAIN).param_groups
        for p in group["params"]
    }
    assert len(shares) == sum(p.requires_grad for p in found.parameters())
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            assert shares[id(parameter)] == (0.25 if name.startswith("gates.") else 1.0), name
    trainer = fine_tune(found, DATASET, changed(TRAIN, max_steps=1), CPU)
    rates = [group["lr"] for group in trainer.optimizer.param_groups if group["params"]]
    assert rates == pytest.approx([TRAIN.learning_rate, 0.25 * TRAIN.learning_rate])


def test_a_gate_at_rest_moves_less_than_one_at_full_rate():
    moved = []
    for share in (1e-6, 1.0):
        found = adapted(gate_learning_rate=share)
        before = found.gates["x"].linear.weight.detach().clone()
        fine_tune(found, DATASET, TRAIN, CPU)
        moved.append(float((found.gates["x"].linear.weight.detach() - before).abs().max()))
    assert moved[0] < 1e-4 < moved[1]


def test_what_trains_nothing_is_told():
    found = adapted()
    found.use(None)
    with pytest.raises(InputError, match="no active adapter"):
        fine_tune(found, DATASET, TRAIN, CPU)
    with pytest.raises(InputError, match="all parameters of the model are frozen"):
        base().requires_grad_(False).origin()


def test_in_part_means_that_the_rest_stays():
    model = base().requires_grad_(False)
    model.output_bias.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fine_tune(model, DATASET, TRAIN, CPU)
    same = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert set(before) - same == {"output_bias"}
