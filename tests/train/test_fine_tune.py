"""Training a model that is there further: whole, in part, or by its adapter."""

import pytest
import torch
from small_models import Stop, stop_at

from reclib import hardware
from reclib.config import AdapterConfig, InputError, TrainConfig, changed, model_config
from reclib.data.prepare import synthetic_dataset
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, base_hash
from reclib.train import saving
from reclib.train.fit import fine_tune, fit

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


def test_checkpoints_hold_the_adapter_and_its_gate_and_fit_no_other_origin(tmp_path):
    trainer = fine_tune(adapted(), DATASET, TRAIN, CPU, tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters." in name or name.startswith("gates.") for name in trained)
    for name in ("best", f"step-{trainer.total_steps}"):
        tensors, state = saving.load_checkpoint(tmp_path / name)
        weights = {key for key in tensors if not key.startswith(("optimizer.", "random."))}
        assert {key.removeprefix("model.") for key in weights} == trained
        assert state["identity"]["origin"]["base_sha256"] == base_hash(base())
    for other, message in (
        (adapted(seed=1), "origin.base_sha256 is"),
        (adapted(alpha=3.0), "origin.adapter is"),
        (adapted(gate_learning_rate=0.3), "origin.adapter is"),
        (base(), "origin.trained is"),
    ):
        with pytest.raises(InputError, match=f"of another run.*{message}"):
            fine_tune(other, DATASET, TRAIN, CPU, tmp_path)
    new = fit(SHAPE, DATASET, changed(TRAIN, max_steps=1), CPU, tmp_path / "new")
    with pytest.raises(InputError, match=r"origin\.base_sha256 is None there"):
        fine_tune(new.model, DATASET, new.config, CPU, tmp_path / "new")


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    for name, new in (
        ("whole", base),
        ("ilora", lambda: adapted(dropout=0.1)),
        ("gated", lambda: adapted(kind="gated", dropout=0.1)),
    ):
        folder = tmp_path / name
        reference = fine_tune(new(), DATASET, TRAIN, CPU)
        with pytest.raises(Stop):
            fine_tune(new(), DATASET, changed(TRAIN, checkpoint_seconds=0.0), CPU, folder, stop_at(5))
        again, finished = (fine_tune(new(), DATASET, TRAIN, CPU, folder) for _ in range(2))
        for found in (again, finished):
            pairs = zip(reference.model.parameters(), found.model.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
        columns = ("train_loss", "ndcg@10", "mrr")
        rows = [[row[c] for row in t.progress.history for c in columns] for t in (reference, again)]
        assert rows[0] == rows[1]


def test_the_gate_has_a_rate_of_its_own():
    found = adapted(gate_learning_rate=0.25)
    trainer = fine_tune(found, DATASET, changed(TRAIN, max_steps=1), CPU)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        share = 0.25 if name.startswith("gates.") else 1.0
        assert rates[id(parameter)] == pytest.approx(share * TRAIN.learning_rate), name
    moved = []
    for share in (1e-6, 1.0):
        model = adapted(gate_learning_rate=share)
        gate = model.gates["x"].linear.weight
        before = gate.detach().clone()
        fine_tune(model, DATASET, changed(TRAIN, max_steps=4), CPU)
        moved.append(float((gate.detach() - before).abs().max()))
    assert moved[0] < 1e-4 < moved[1]


def test_only_what_is_not_frozen_is_trained_and_something_must_be():
    model = base().requires_grad_(False)
    with pytest.raises(InputError, match="all parameters of the model are frozen"):
        model.origin()
    model.output_bias.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fine_tune(model, DATASET, TRAIN, CPU)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"output_bias"}
    found = adapted()
    found.use(None)
    with pytest.raises(InputError, match="no active adapter"):
        fine_tune(found, DATASET, TRAIN, CPU)
