"""The loop: resume to the same bits, accumulation, precision, divergence, early stop; training further."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from adapting import UNTIED, adapted, base
from conftest import refused
from small_models import NUM_ITEMS, Stop, dataset_of, histories, small_model, stop_at

from reclib import hardware
from reclib.config import InputError, TrainConfig, changed, model_config
from reclib.data.dataset import evaluation
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import base_hash
from reclib.train import saving
from reclib.train import trainer as trainer_module
from reclib.train.fit import Options, fine_tune, fit, fit_main
from reclib.train.saving import unique_tensors
from reclib.train.trainer import StepGraphs, Trainer, chosen_route, clip_gradients, refuse_graphs

CPU = hardware.resolve("cpu")
RECIPE = {"epochs": 4, "batch_size": 8, "eval_every": 2, "lr_warmup_steps": 2, "checkpoint_seconds": 0.0}
SHORT = TrainConfig(**RECIPE, learning_rate=1e-2)
DATASET = synthetic_dataset(num_users=60, num_items=NUM_ITEMS, mean_len=9.0, seed=0)
MODEL = small_model(dropout=0.2)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in unique_tensors(trainer.model).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def run_steps(config: TrainConfig, model=None, steps: int = 3) -> tuple[Trainer, list]:
    torch.manual_seed(0)
    given = histories([9, 4, 12, 7, 3, 8, 5, 6] * 4)
    trainer = Trainer(Bert4Rec(model or small_model()), given, config, CPU, "x")
    return trainer, list(itertools.islice(trainer.steps(), steps))


def test_muon_moves_the_encoders_matrices_and_adamw_all_else():
    muon = changed(SHORT, optimizer="muon", clip_norm=None)
    adamw = changed(muon, optimizer="fused")
    (mixed, _), (adam, _) = (run_steps(config, steps=1) for config in (muon, adamw))
    for name, tensor in weights(mixed).items():
        is_matrix = name.startswith("blocks.") and tensor.dim() == 2
        assert torch.equal(tensor, weights(adam)[name]) != is_matrix, name


def test_warm_up_rises_and_cosine_ends_at_its_share():
    config = TrainConfig(learning_rate=0.1, lr_warmup_steps=4, lr_final_share=0.1)
    rates = [trainer_module.learning_rate(step, 20, config) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_clipping_is_torchs_whether_gradients_are_divided_now_or_by_the_fused_optimiser():
    torch.manual_seed(0)
    values, gradients = torch.randn(3, 40), torch.randn(3, 40)
    results = []
    for clip in (
        lambda parameters, _: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        lambda parameters, _: clip_gradients(parameters, 1.0),
        lambda parameters, optimizer: clip_gradients(parameters, 1.0, optimizer),
    ):
        parameter, norms = torch.nn.Parameter(values.clone()), []
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for scale in (0.01, 100.0, 1.0):  # of equal ones Adam would undo any division
            parameter.grad = scale * gradients
            norms.append(clip([parameter], optimizer))
            optimizer.step()
        results.append([parameter.detach(), *norms])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_steps_as_graphs_are_the_same_steps(monkeypatch):
    """A graph reads where the first batch of its shape lay, and is given the next one there."""
    captures, replays = [], []

    def capture(compute, pool):
        captures.append(compute)

        def replay():
            replays.append(compute)
            return compute()

        return replay

    monkeypatch.setattr("reclib.hardware.compile_choice", lambda mode, *_: (mode, "asked for"))
    config = changed(SHORT, epochs=8, bucket_steps=1)
    plain, wanted = run_steps(config, steps=24)
    monkeypatch.setattr("reclib.train.trainer.StepGraphs", partial(StepGraphs, capture=capture))
    graph, stats = run_steps(changed(config, compile_mode="graph"), steps=24)
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in wanted], rel=1e-4)
    assert [s.grad_norm for s in stats] == pytest.approx([s.grad_norm for s in wanted], rel=1e-3)
    assert 0 < len(captures) < len(replays) < 24
    assert len({s.loss for s in stats}) == 24  # kept apart from what the next replay writes
    torch.testing.assert_close(weights(graph), weights(plain), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_captured_is_refused_and_on_a_cpu_graphs_are_off():
    config = changed(SHORT, compile_mode="graph")
    refuse_graphs(config, "bf16", 1, False)
    refused("no precision=fp16", refuse_graphs, config, "fp16", 1, False)
    refused("no optimizer='loop'", refuse_graphs, changed(config, optimizer="loop"), "bf16", 1, False)
    refused("no loss='fused'", refuse_graphs, changed(config, loss="fused"), "bf16", 1, False)
    micro = changed(config, micro_batch_size=4)
    refused("no micro-batches and no 2 processes", refuse_graphs, micro, "bf16", 2, False)
    refused("no an adapted model", refuse_graphs, config, "bf16", 1, True)
    trainer, _ = run_steps(config, steps=1)
    assert (trainer.compile_mode, trainer.graphs) == ("off", None)
    assert trainer.compile_reason.startswith("not applicable: graph")


def test_a_run_has_one_route_by_its_largest_batch_and_the_card():
    h100 = hardware.Card(type="cuda", name="H100", label="h100", capability=(9, 0), memory_bytes=80 * 10**9)
    t4 = hardware.Card(type="cuda", name="T4", label="t4", capability=(7, 5), memory_bytes=15 * 10**9)
    model, long = model_config("85m"), histories([9] * 6000, num_items=100)
    for card, size, compiled, wanted in (
        (h100, 512, False, "plain"),
        (h100, 512, True, "fused"),
        (h100, 5120, True, "chunked"),
        (t4, 512, False, "plain"),
        (t4, 1024, False, "chunked"),
        (CPU.card, 512, True, "inplace"),
    ):
        assert chosen_route(TrainConfig(batch_size=size), model, long, card, compiled) == wanted
    plain = TrainConfig(batch_size=5120, loss="plain")
    assert chosen_route(plain, model, long, h100, True) == "plain"  # a route that was chosen is not fused


def test_fp16_overflow_is_skipped_and_counted_then_training_goes_on():
    torch.manual_seed(0)
    config = changed(SHORT, precision="fp16", epochs=6)
    trainer = Trainer(Bert4Rec(small_model()), histories([9] * 32), config, CPU, "x")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows until it has shrunk
    before, steps = weights(trainer), trainer.steps()
    assert next(steps).skipped
    assert same(weights(trainer), before)
    rest = list(steps)
    assert trainer.progress.skipped_steps == 1 + sum(s.skipped for s in rest)
    assert not rest[-1].skipped
    assert not same(weights(trainer), before)
    assert all(v.isfinite().all() for v in weights(trainer).values())


@pytest.mark.parametrize("looked", [True, False])
def test_divergence_stops_with_a_clear_error_and_is_not_saved(tmp_path, monkeypatch, looked):
    """Where the loop looks at the loss it stops before a save; between looks, as on CUDA, the save does."""
    trainers: list[Trainer] = []
    steps = Trainer.steps

    def poison(stats):
        if stats.step == 5:
            with torch.no_grad():
                trainers[0].model.item_table.weight[1:] = float("inf")

    monkeypatch.setattr(Trainer, "steps", lambda self: trainers.append(self) or steps(self))
    if not looked:
        monkeypatch.setattr(Trainer, "_check_finite", lambda *_: None)
    with pytest.raises(InputError, match=r"diverged at step 6: loss nan.* in fp32"):
        fit(MODEL, DATASET, SHORT, CPU, tmp_path, Options(on_step=poison))
    assert saving.latest(tmp_path).name == "step-5"


def test_the_best_weights_on_validation_are_returned_and_early_stop_counts():
    config = changed(SHORT, epochs=40, eval_every=1, patience=3, learning_rate=0.05)
    trainer = fit(MODEL, DATASET, config, CPU)
    values = [row["ndcg@10"] for row in trainer.progress.history]
    best = int(np.argmax(values))
    assert trainer.progress.best_epoch == best
    assert len(values) == best + 1 + 3
    assert len(values) < 40


@pytest.mark.parametrize(
    ("changes", "stops"),
    [({}, (3, 11, 17, 25)), ({"objective": "next_item"}, (5,)), ({"optimizer": "muon"}, (5, 17))],
)
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, changes, stops):
    """Stops lie inside epochs, right before and after evaluations."""
    config = changed(SHORT, **changes)
    model = changed(MODEL, causal=config.objective == "next_item")
    whole = fit(model, DATASET, config, CPU, tmp_path / "whole")
    history = whole.progress.history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    for step in stops:
        with pytest.raises(Stop):
            fit(model, DATASET, config, CPU, tmp_path / "parts", stop_at(step))
    parts = fit(model, DATASET, config, CPU, tmp_path / "parts")
    never = Options(on_step=lambda stats: pytest.fail("trained"))
    finished = fit(model, DATASET, config, CPU, tmp_path / "parts", never)
    for trainer in (parts, finished):
        assert same(weights(trainer), weights(whole))
    clocks = {"train_seconds": 0, "eval_seconds": 0}
    assert [row | clocks for row in parts.progress.history] == [row | clocks for row in history]


def test_data_in_which_nobody_has_three_interactions_are_refused(tmp_path):
    two = dataset_of([[(1, 0), (2, 1)], [(2, 0), (1, 1)]], num_items=2)
    for train in (SHORT, changed(SHORT, prior="counts")):
        model = changed(MODEL, num_items=2)
        refused("leaves no validation targets", fit, model, two, train, CPU, tmp_path / "run")
    refused("no targets to rank", metrics.rank, iter(()), evaluation(two, "test"), remove_seen=True)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train = changed(SHORT, epochs=1)
    fit(MODEL, DATASET, train, CPU, tmp_path)
    for shape, recipe, message in (
        ({}, {"seed": 1}, "train.seed is 0 there and 1 here"),
        ({"num_layers": 1}, {}, "model.num_layers is 2 there and 1 here"),
        ({"causal": True}, {}, "objective='cloze' does not go with causal=True"),
        ({}, {"objective": "next_item"}, "objective='next_item' does not go with causal=False"),
    ):
        refused(message, fit, changed(MODEL, **shape), DATASET, changed(train, **recipe), CPU, tmp_path)


def test_command_line_names_what_is_wrong_and_writes_nothing(tmp_path, capsys):
    assert fit_main(["--out", str(tmp_path / "x"), "-p", "batch_size", "-4"]) == 2
    assert capsys.readouterr().err == "error: parameter 'batch_size' is -4: input should be greater than 0\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("micro", [None, 4])
def test_sinks_give_the_gradients_of_autograd(tied, micro, monkeypatch):
    config = changed(SHORT, batch_size=8, micro_batch_size=micro)
    model = small_model(tied=tied, max_len=5)  # short windows: rows of the table come and go between steps
    _, plain = run_steps(config, model, steps=1)
    reference, wanted = run_steps(config, model, steps=6)
    monkeypatch.setattr("reclib.model.bert4rec.SMALLEST_BYTES", 0)
    trainer, stats = run_steps(config, model, steps=6)
    assert len(trainer.sinks) == (1 if tied else 2)
    assert not reference.sinks
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in wanted], rel=1e-5)
    assert [s.grad_norm for s in stats] == pytest.approx([s.grad_norm for s in wanted], rel=1e-5)
    assert plain[0].loss == wanted[0].loss
    gradients = ([p.grad for p in each.parameters if p.dim() > 1] for each in (trainer, reference))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_sinks_of_an_earlier_run_are_gone_in_the_next(monkeypatch):
    monkeypatch.setattr("reclib.model.bert4rec.SMALLEST_BYTES", 0)
    first, _ = run_steps(SHORT, steps=2)
    config = changed(SHORT, optimizer="loop", loss="plain")
    again = Trainer(first.model, histories([9, 4, 12]), config, CPU, "x")
    assert not again.sinks
    next(again.steps())
    assert first.model.item_table.weight.grad.abs().sum() > 0


def test_evaluation_does_not_reach_the_sinks(monkeypatch):
    losses = []
    for smallest in (0, 2**40):  # with sinks and without
        monkeypatch.setattr("reclib.model.bert4rec.SMALLEST_BYTES", smallest)
        losses.append([row["train_loss"] for row in fit(MODEL, DATASET, SHORT, CPU).progress.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_checkpoints_hold_the_adapter_and_its_gate_and_fit_no_other_origin(tmp_path):
    trainer = fine_tune(adapted(), DATASET, SHORT, CPU, tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".adapters." in name or name.startswith("gates.") for name in trained)
    for name in ("best", f"step-{trainer.total_steps}"):
        tensors, state = saving.load_checkpoint(tmp_path / name)
        weights = {key for key in tensors if not key.startswith(("optimizer.", "random."))}
        assert {key.removeprefix("model.") for key in weights} == trained
        assert state["identity"]["origin"]["base_sha256"] == base_hash(base(**UNTIED))
    for other, message in (
        (adapted(model=base(seed=1, **UNTIED)), "origin.base_sha256 is"),
        (adapted(alpha=3.0), "origin.adapter is"),
        (adapted(gate_learning_rate=0.3), "origin.adapter is"),
        (base(**UNTIED), "origin.trained is"),
    ):
        refused(f"of another run.*{message}", fine_tune, other, DATASET, SHORT, CPU, tmp_path)
    folder = tmp_path / "new"
    new = fit(MODEL, DATASET, changed(SHORT, max_steps=1), CPU, folder)
    refused(r"origin\.base_sha256 is None there", fine_tune, new.model, DATASET, new.config, CPU, folder)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    config = changed(SHORT, batch_size=16, checkpoint_seconds=600.0)  # 4 steps an epoch
    for kind in ("whole", "ilora", "gated"):

        def tuned(folder=None, options=None, kind=kind, **changes: object) -> Trainer:
            model = base(dropout=0.1, **UNTIED)
            model = model if kind == "whole" else adapted(kind, model, dropout=0.1)
            return fine_tune(model, DATASET, changed(config, **changes), CPU, folder, options)

        reference = tuned()
        with pytest.raises(Stop):
            tuned(tmp_path / kind, stop_at(10), checkpoint_seconds=0.0)
        resumed, finished = (tuned(tmp_path / kind) for _ in range(2))
        for trainer in (resumed, finished):
            pairs = zip(reference.model.parameters(), trainer.model.parameters(), strict=True)
            assert all(torch.equal(expected, parameter) for expected, parameter in pairs)
        columns = ("train_loss", "ndcg@10", "mrr")
        rows = [[row[c] for row in t.progress.history for c in columns] for t in (reference, resumed)]
        assert rows[0] == rows[1]


def test_the_gate_has_a_rate_of_its_own():
    model = adapted(gate_learning_rate=0.25)
    trainer = fine_tune(model, DATASET, changed(SHORT, max_steps=1, lr_warmup_steps=1), CPU)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        share = 0.25 if name.startswith("gates.") else 1.0
        assert rates[id(parameter)] == pytest.approx(share * SHORT.learning_rate), name


def test_only_what_is_not_frozen_is_trained_and_something_must_be():
    model = base().requires_grad_(False)
    refused("all parameters of the model are frozen", model.origin)
    model.output_bias.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fine_tune(model, DATASET, SHORT, CPU)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"output_bias"}
    without_adapter = adapted()
    without_adapter.use(None)
    refused("no active adapter", fine_tune, without_adapter, DATASET, SHORT, CPU)
