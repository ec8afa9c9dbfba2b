from __future__ import annotations

import numpy as np
import pytest
import torch
from engine import histories
from test_footprint import CPU, shapes_of, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reclib.config import AdapterConfig, ModelConfig, TrainConfig
from reclib.cost import work
from reclib.cost.work import AdapterPlan
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.train import timing
from reclib.train.trainer import Trainer

PLANS = [
    AdapterPlan(kind="lora", rank=8),
    AdapterPlan(kind="gated", rank=3),
    AdapterPlan(kind="ilora", rank=6, num_experts=3),
]
CASES: dict[str, tuple[dict, dict]] = {
    "tied": ({}, {}),
    "one layer": ({"num_layers": 1}, {}),
    "untied, post-norm, mlp head": (
        {"tied": False, "norm": "post", "embedding_norm": True, "head": "mlp", "num_layers": 3},
        {},
    ),
    "causal": ({"causal": True}, {"objective": "next_item"}),
    "all positions": ({}, {"layout": "padded", "head_rows": "all"}),
}


def adapted_trainer(
    model: ModelConfig, train: TrainConfig, plan: AdapterPlan, lengths: list[int] | np.ndarray
) -> Trainer:
    torch.manual_seed(0)
    adapted = AdaptedModel(Bert4Rec(model))
    config = AdapterConfig(kind=plan.kind, rank=plan.rank, num_experts=plan.num_experts)
    adapted.add("a", config)
    some = histories(list(lengths), num_items=model.num_items)
    return Trainer(adapted, some, train, CPU, "test")


def test_flops_of_the_parts_are_those_that_torch_counts_on_the_adapted_model():
    for plan in PLANS:
        for case in CASES:
            changes, recipe = CASES[case]
            model = small_model(**changes)
            train = TrainConfig(batch_size=32, epochs=9, precision="fp32", **recipe)
            trainer = adapted_trainer(model, train, plan, [9] * 64)
            parts = work.step_parts(model, train, shapes_of(trainer, 1), adapter=plan)
            loop = trainer.steps()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                next(loop)
            loop.close()
            assert counter.get_total_flops() == pytest.approx(sum(part.flops for part in parts), rel=1e-9)


def test_trained_parameters_are_those_of_the_adapted_model():
    for plan in PLANS:
        model = small_model(num_layers=3, head="mlp")
        trainer = adapted_trainer(model, TrainConfig(batch_size=8), plan, [9] * 8)
        assert work.trained_parameters(model, plan) == sum(p.numel() for p in trainer.parameters)


def test_memory_is_what_the_profiler_counts():
    for plan in PLANS[::2]:
        model = small_model(hidden_dim=128, num_items=3000, num_layers=3, tied=False, max_len=50)
        train = TrainConfig(batch_size=128, epochs=99, precision="fp32")
        trainer = adapted_trainer(model, train, plan, np.random.default_rng(0).integers(3, 17, 512))
        measured = timing.peak_tensor_bytes(trainer)
        found = work.at_shapes(model, train, shapes_of(trainer, 2), "fp32", "cpu", plan)
        buffer = found.parts["logits"]  # kept from step to step: seen in no step but the first
        assert found.total - buffer == pytest.approx(measured, rel=0.25)
        weights = 4 * sum(p.numel() for p in trainer.model.parameters())
        assert found.parts["weights"] == weights
        assert found.state - weights == 12 * sum(p.numel() for p in trainer.parameters)


def test_a_frozen_step_saves_the_gradients_of_weights_and_the_update():
    model = small_model(hidden_dim=64, num_items=2000, tied=False)
    train, one = TrainConfig(batch_size=64), work.Shapes(4, 6, 20, 19, 40, 64)
    full = {part.name: part for part in work.step_parts(model, train, one)}
    adapted = {part.name: part for part in work.step_parts(model, train, one, adapter=PLANS[0])}
    assert adapted["head: products"].flops == pytest.approx(2 / 3 * full["head: products"].flops)
    assert adapted["encoder: linear maps"].flops < 2 / 3 * full["encoder: linear maps"].flops
    assert adapted["AdamW"].elements == work.trained_parameters(model, PLANS[0])
    assert adapted["GELU"] == full["GELU"]
