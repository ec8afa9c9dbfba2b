"""Adapters: nothing is bypassed, kinds are what they say, and frozen weights cost nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from adapting import (
    EVERYTHING,
    KINDS,
    UNTIED,
    adapted,
    base,
    batch,
    rows_of,
    scores,
    scores_everywhere,
    stir,
)
from engine import histories, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from reclib import hardware
from reclib.config import AdapterConfig, InputError, ModelConfig, TrainConfig, changed, validated
from reclib.data.batches import Batch
from reclib.data.dataset import Evaluation
from reclib.evaluate.metrics import model_scores
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, base_hash
from reclib.model.lora import LowRank
from reclib.train import losses as reclib_losses
from reclib.train import saving
from reclib.train.losses import batch_loss
from reclib.train.trainer import Trainer

CPU = hardware.resolve("cpu")
TRAIN = TrainConfig(batch_size=8, epochs=4, mask_prob=0.3, lr_warmup_steps=1, learning_rate=1e-2)
LENGTHS = [9, 4, 12, 7, 3, 8, 5, 6]


def loss_of(model: AdaptedModel | Bert4Rec, one: Batch) -> torch.Tensor:
    return batch_loss(model, one, TRAIN, one.num_targets)


# -- nothing is bypassed -------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing():
    for kind in KINDS:
        for shape in [UNTIED, {"norm": "post", "positions": "sinusoidal"}]:
            model, one = base(**shape), batch()
            before = scores(model, one)
            found = AdaptedModel(model)
            found.add("new", AdapterConfig(kind=kind, targets=EVERYTHING))
            torch.testing.assert_close(scores(found, one), before, rtol=0, atol=1e-6)


def test_every_adapter_changes_the_output_in_train_and_in_eval():
    for kind in KINDS:
        for training in [True, False]:
            found = adapted(kind, targets=EVERYTHING).train(training)
            one = batch()
            before, everywhere = scores(found, one), scores_everywhere(found, one)
            torch.testing.assert_close(before, everywhere, rtol=1e-4, atol=1e-5)
            assert len(found.layers()) == 4 * 2 + 3
            names = [name for name, p in found.named_parameters() if p.requires_grad]
            assert len(names) == 11 * 2 + {"gated": 11, "ilora": 1}.get(kind, 0)
            for name in names:
                parameter = found.get_parameter(name)
                with torch.no_grad():
                    kept = parameter.clone()
                    parameter.add_(0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(3)))
                    for way, wanted in ((scores, before), (scores_everywhere, everywhere)):
                        assert float((way(found, one) - wanted).abs().max()) > 1e-5, name
                    parameter.copy_(kept)
            assert torch.equal(scores(found, one), before)


def test_every_adapter_and_the_gate_have_a_gradient_and_nothing_else_has():
    for kind in KINDS:
        found = adapted(kind, targets=EVERYTHING).train()
        loss_of(found, batch()).backward()
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                assert float(parameter.grad.abs().max()) > 0, name
            else:
                assert parameter.grad is None, name


def test_the_keys_queries_and_values_of_the_last_layer_are_adapted_where_queries_ask():
    found = adapted("lora", targets=("blocks.1.attention.qkv",))
    one = batch()
    torch.testing.assert_close(scores(found, one), scores_everywhere(found, one), rtol=1e-4, atol=1e-5)
    before = scores(found, one)
    B = found.get_parameter("base.blocks.1.attention.qkv.adapters.default.lora_B.weight")
    for part in (slice(0, 16), slice(16, 32), slice(32, 48)):
        with torch.no_grad():
            kept = B.clone()
            B[part] += 1.0
            assert float((scores(found, one) - before).abs().max()) > 1e-5
            B.copy_(kept)


# -- kinds are what they say ---------------------------------------------------------------------------------


@given(rank=st.sampled_from([(4, 1), (4, 2), (8, 4), (6, 3), (8, 8)]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_sum_over_experts_is_one_product(rank, seed):
    r, K = rank
    torch.manual_seed(seed)
    config = AdapterConfig(kind="ilora", rank=r, num_experts=K, alpha=6.0)
    layer = LowRank(5, 7, config)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, g = torch.randn(2, 3, 5), torch.randn(2, 3, K).softmax(-1)
    wanted = torch.zeros(2, 3, 7)
    each = r // K
    for k in range(K):
        A, B = (
            layer.lora_A.weight[k * each : (k + 1) * each],
            layer.lora_B.weight[:, k * each : (k + 1) * each],
        )
        wanted += 6.0 / each * g[..., k, None] * (x @ A.t() @ B.t())
    factors = g.repeat_interleave(each, -1) * config.scaling
    found = layer.added_to(torch.zeros(2, 3, 7), x, factors, slice(None))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def copied(source: AdaptedModel, target: AdaptedModel) -> AdaptedModel:
    """Give the adapters of one model the weights of the other's, gates apart."""
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
    return target


def test_a_uniform_gate_is_plain_lora():
    one = batch()
    plain = adapted("lora", targets=EVERYTHING, alpha=12.0)
    gated = copied(plain, adapted("ilora", targets=EVERYTHING, alpha=12.0))
    assert float((scores(gated, one) - scores(plain, one)).abs().max()) > 1e-3
    torch.nn.init.zeros_(gated.gates["default"].linear.weight)
    torch.testing.assert_close(scores(gated, one), scores(plain, one), rtol=1e-5, atol=1e-5)


def test_rslora_and_gated_are_lora_of_another_factor():
    one = batch()
    plain = adapted("lora", alpha=16.0)
    stable = copied(plain, adapted("rslora", alpha=16.0 / 8**0.5))
    torch.testing.assert_close(scores(stable, one), scores(plain, one), rtol=1e-5, atol=1e-5)
    halved = copied(plain, adapted("gated", alpha=32.0))
    for name, parameter in halved.named_parameters():
        if name.endswith("lora_gate"):
            torch.nn.init.zeros_(parameter)  # sigmoid(0) is a half
    torch.testing.assert_close(scores(halved, one), scores(plain, one), rtol=1e-5, atol=1e-5)


def test_packed_equals_padded():
    packed, padded = batch(), batch(layout="padded")
    assert packed.items.shape[0] < padded.items.shape[0]
    for control in ["none", "noise", "fixed_gate", "static_gate"]:
        found = adapted("ilora", targets=EVERYTHING, control=control)
        by_target = [
            scores(found, one)[
                one.segment_ids.flatten()[one.target_places[: one.num_targets]].argsort(stable=True)
            ]
            for one in (packed, padded)
        ]
        torch.testing.assert_close(*by_target, rtol=1e-4, atol=1e-5)


def test_the_gate_is_the_segments_own():
    found = adapted("ilora")
    one = batch()
    weights = found.expert_weights(*rows_of(one)).detach()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    segments = [weights[one.segment_ids == s] for s in range(1, one.num_sequences + 1)]
    for values in segments:
        torch.testing.assert_close(values, values[:1].expand_as(values))
    first = torch.stack([values[0] for values in segments])
    assert float(first.std(0).max()) > 1e-3


def test_as_many_queries_as_places_are_not_taken_for_places():
    found, one = adapted("ilora", targets=EVERYTHING), batch()
    R, L = one.items.shape
    backwards = torch.arange(L - 1, -1, -1).expand(R, -1)
    with torch.no_grad():
        states = found.encode(*rows_of(one), backwards)
        assert states.shape[:2] == (R, L)
        torch.testing.assert_close(states.flip(1), found.encode(*rows_of(one)), rtol=1e-4, atol=1e-5)


def test_a_gate_on_states_is_trained_while_they_stay_as_they_are():
    for representation in ["base_state", "causal_state"]:
        reader = base(seed=7, causal=True)
        found = AdaptedModel(base(**UNTIED))
        found.add("x", AdapterConfig(kind="ilora", representation=representation), reader)
        stir(found).train()
        before = found.expert_weights(*rows_of(batch())).detach()
        loss_of(found, batch()).backward()
        assert float(found.gates["x"].linear.weight.grad.abs().max()) > 0
        assert all(p.grad is None for p in (*found.twin.parameters(), *reader.parameters()))
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(found.expert_weights(*rows_of(batch())), before)


def test_dropout_leaves_the_frozen_state_alone():
    found = AdaptedModel(base(**(UNTIED | {"dropout": 0.5})))
    found.add("x", AdapterConfig(kind="ilora", representation="base_state"))
    found.train()
    one, again = (found.expert_weights(*rows_of(batch())) for _ in range(2))
    assert torch.equal(one, again)


def test_a_causal_model_takes_an_instance_for_each_place():
    found = adapted("ilora", base(causal=True))
    rows = [t.clone() for t in rows_of(batch(layout="padded"))]
    with torch.no_grad():
        before = found.encode(*rows)
        rows[0][:, 2] = 1
        after = found.encode(*rows)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert float((before[:, 2:] - after[:, 2:]).abs().max()) > 1e-3


# -- compiled, in threads, by the trainer --------------------------------------------------------------------


def test_compiled_is_eager():
    """In one graph: the gate leaves no break in it."""
    found = adapted("ilora", targets=EVERYTHING).train()
    one = batch()
    compiled = torch.compile(found.encode, backend="eager", dynamic=True, fullgraph=True)
    rows = (*rows_of(one), one.query_index)
    gradients = []
    for encode in (found.encode, compiled):
        found.zero_grad()
        batch_loss(found, one, TRAIN, one.num_targets, encode).backward()
        gradients.append({n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None})
    torch.testing.assert_close(compiled(*rows), found.encode(*rows), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_two_threads_do_not_see_each_others_gates():
    found, other = adapted("ilora"), batch((5, 5, 12, 3, 8, 9, 2, 2))
    one = batch()
    wanted = scores(found, one), scores(found, other)
    wrong: list[float] = []

    def work(given: Batch, right: torch.Tensor) -> None:
        wrong.extend(float((scores(found, given) - right).abs().max()) for _ in range(20))

    threads = [threading.Thread(target=work, args=pair) for pair in zip((one, other), wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 40
    assert max(wrong) < 1e-4


def test_without_factors_an_instance_wise_layer_refuses():
    found = adapted("ilora")
    with pytest.raises(RuntimeError, match="without factors"):
        found.base.blocks[0].ffn(torch.zeros(1, 2, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_takes_it_as_it_is_and_goes_on_to_the_same_bits(kind, tmp_path):
    def new() -> Trainer:
        found = AdaptedModel(base(**(UNTIED | {"dropout": 0.1})))
        torch.manual_seed(4)
        found.add("x", AdapterConfig(kind=kind, targets=EVERYTHING, dropout=0.1))
        torch.manual_seed(5)
        return Trainer(found, histories(LENGTHS * 4), TRAIN, CPU, found.base_sha256)

    def finish(trainer: Trainer, stop: int = 99) -> list[float]:
        losses = []
        for stats in trainer.steps():
            losses.append(stats.loss)
            if stats.step == stop:
                break
        return losses

    whole = new()
    before = {n: p.clone() for n, p in whole.model.named_parameters()}
    losses = finish(whole)
    assert losses[-1] < losses[0]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    half = new()
    finish(half, 8)
    half.save(tmp_path)
    saved, _ = saving.load_checkpoint(tmp_path / "step-8")
    kept = sum(t.numel() for k, t in saved.items() if k.startswith("model."))
    assert kept == sum(p.numel() for p in whole.parameters)
    assert len(half.optimizer.state) == len(half.parameters)
    again = new()
    assert again.resume(tmp_path)
    finish(again)
    for one, other in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(one, other)


def test_ranking_sees_the_adapter():
    given_ = histories([5, 7, 3])
    part = Evaluation(given_, given_.items[given_.starts])
    found = adapted("ilora", targets=EVERYTHING)
    with_it = next(model_scores(found, part, torch.device("cpu")))[1].clone()
    with found.disable_adapter():
        without = next(model_scores(found, part, torch.device("cpu")))[1].clone()
    assert float((with_it - without).abs().max()) > 1e-2
    wanted = next(model_scores(base(**UNTIED), part, torch.device("cpu")))[1]
    torch.testing.assert_close(without, wanted, rtol=1e-5, atol=1e-5)


# -- frozen weights cost nothing -----------------------------------------------------------------------------


def test_frozen_layers_have_no_weight_gradient_product():
    """A product costs 1 forward, 1 for its input's gradient, 1 for its weight's: frozen, no third."""
    shape = {"hidden_dim": 64, "num_layers": 3} | UNTIED
    one = batch()

    def products(model: torch.nn.Module, backward: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            out = model.encode(*rows_of(one), one.query_index)
            if backward:
                out.square().sum().backward()
        return counter.get_total_flops()

    forward = products(base(**shape), False)
    full = products(base(**shape).requires_grad_(True), True)
    found = adapted("ilora", base(**shape), rank=4, num_experts=2)
    adapters = products(found, False) - forward
    assert 0 < adapters < 0.3 * forward
    frozen = products(found.train(), True)
    assert full > 2.8 * forward
    assert frozen <= 2 * forward + 3 * adapters


def test_an_adapted_output_table_has_no_product_for_the_frozen_part(monkeypatch):
    """And its gradients are those of autograd's own product, which knows nothing of frozen columns."""
    computed = AdaptedModel.frozen_columns
    for kind in ["lora", "ilora"]:
        for loss in ["inplace", "plain", "chunked"]:
            for output_bias in [True, False]:
                model = base(**UNTIED, output_bias=output_bias)
                found = adapted(kind, model, targets=("head",), rank=4, num_experts=2).train()
                if output_bias:
                    model.output_bias.requires_grad_(True)
                one, gradients, products = batch(tuple(LENGTHS * 4)), [], []
                monkeypatch.setattr(reclib_losses, "LARGE_LOGITS_BYTES", 1)  # several chunks
                assert len(one.targets) > 16
                for route, known in ((loss, computed), ("plain", 0)):
                    monkeypatch.setattr(AdaptedModel, "frozen_columns", known)
                    found.zero_grad()
                    with FlopCounterMode(display=False) as counter:
                        (3 * batch_loss(found, one, changed(TRAIN, loss=route), one.num_targets)).backward()
                    products.append(counter.get_total_flops())
                    gradients.append(
                        {n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None}
                    )
                assert gradients[0].keys() == gradients[1].keys()
                for name, gradient in gradients[1].items():
                    torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6)
                frozen_part = 2 * len(one.targets) * found.config.num_items * found.config.hidden_dim
                assert products[1] - products[0] >= frozen_part


def test_the_frozen_part_is_left_out_in_16_bit_as_well():
    for loss in ["inplace", "plain", "chunked"]:
        found, one = adapted("ilora", targets=("head",)).train(), batch()
        products = []
        for dtype in (torch.float32, torch.bfloat16):
            with FlopCounterMode(display=False) as counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                    value = batch_loss(found, one, changed(TRAIN, loss=loss), one.num_targets)
                value.backward()
            products.append(counter.get_total_flops())
        assert products[0] == products[1]


def test_freezing_takes_gradients_and_sinks_away():
    torch.manual_seed(0)
    model = Bert4Rec(changed(small_model(**UNTIED), num_items=200_000))
    assert len(model.use_sinks(True)) == 2
    model.output_weight.grad = torch.zeros_like(model.output_weight)
    found = AdaptedModel(model)
    found.add("x", AdapterConfig())
    assert model.item_sink is model.output_sink is None
    assert all(p.grad is None for p in model.parameters())
    trainer = Trainer(found, histories(LENGTHS), TRAIN, CPU, "x")
    next(trainer.steps())
    assert trainer.sinks == {}
    assert len(trainer.optimizer.state) == len(found.layers()) * 2


def test_frozen_weights_can_be_held_in_the_precision_of_the_products():
    found, one = adapted("ilora", targets=EVERYTHING), batch()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_of(found, one)
        found.hold_frozen(torch.bfloat16)
        held = loss_of(found, one)
        held.backward()
    assert found.base.item_table.weight.dtype == torch.bfloat16
    assert held.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in found.parameters() if p.requires_grad)
    rounded = adapted("lora")
    rounded.hold_frozen(torch.bfloat16)
    with pytest.raises(InputError, match=r"held in torch\.bfloat16"):
        rounded.merge()


def test_counts_say_what_is_trained():
    found = adapted("ilora", targets=EVERYTHING, rank=4, num_experts=2)
    counts = found.counts()
    D, V, r, out = 16, 39, 4, small_model(**UNTIED).output_rows
    layer = r * (D + 3 * D) + r * 2 * D + 2 * r * 5 * D
    assert counts["encoder"] == 2 * layer
    assert counts["tables_and_head"] == r * 2 * D + r * (D + out) + r * (V + D)
    assert counts["gate"] == 2 * D
    assert counts["base"] == sum(p.numel() for p in base(**UNTIED).parameters())
    assert sum(counts.values()) - counts["base"] == sum(
        p.numel() for p in found.parameters() if p.requires_grad
    )


# -- several, merged, taken away -----------------------------------------------------------------------------


def test_several_adapters_on_one_base_chosen_per_batch():
    model, one = base(**UNTIED), batch()
    plain = scores(model, one)
    found = AdaptedModel(model)
    for seed, (name, kind) in enumerate({"june": "lora", "july": "ilora", "new": "lora"}.items()):
        found.add(name, AdapterConfig(kind=kind, targets=EVERYTHING if name == "july" else ("qkv",)))
        if name != "new":
            stir(found, seed)
    answers = {}
    for name in ("june", "july", "new", None, "june", "july"):
        found.use(name)
        answers.setdefault(name, scores(found, one))
        assert torch.equal(scores(found, one), answers[name])
        trained = {
            n.split(".adapters.")[1].split(".")[0]
            for n, p in found.base.named_parameters()
            if p.requires_grad
        }
        assert trained == ({name} if name else set())
    torch.testing.assert_close(answers[None], plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(answers["new"], plain, rtol=0, atol=1e-6)
    assert float((answers["june"] - answers["july"]).abs().max()) > 1e-2
    found.delete("june")
    assert torch.equal(scores(found, one), answers["july"])


def test_merged_equals_unmerged_and_comes_apart_to_the_same_bits():
    for kind in ["lora", "rslora", "gated"]:
        found, one = adapted(kind, targets=EVERYTHING), batch()
        before, bits = scores(found, one), base_hash(found.twin)
        assert found.merge() is None
        assert base_hash(found.twin) != bits
        torch.testing.assert_close(scores(found, one), before, rtol=1e-4, atol=1e-4)
        found.unmerge()
        assert base_hash(found.twin) == bits == found.base_sha256
        assert torch.equal(scores(found, one), before)
        plain = found.merge_and_unload()
        assert type(plain) is Bert4Rec
        assert plain.state_dict().keys() == base(**UNTIED).state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters())
        torch.testing.assert_close(scores(plain, one), before, rtol=1e-4, atol=1e-4)


def test_unloading_gives_the_base_back():
    model = base(**UNTIED)
    before = scores(model, batch())
    found = adapted("lora", model, targets=EVERYTHING)
    assert found.unload() is model
    assert torch.equal(scores(model, batch()), before)


def test_ilora_is_merged_approximately_only_where_asked():
    found, one = adapted("ilora"), batch()
    with pytest.raises(InputError, match=r"its gate differs from user to user"):
        found.merge()
    gates = found.expert_weights(*rows_of(one))[one.segment_ids > 0]
    before = scores(found, one)
    spread = found.merge(approximate=True, gates=gates)
    assert found.merged_approximately
    torch.testing.assert_close(spread.mean, gates.mean(0))
    assert float(spread.standard_deviation.max()) > 0
    assert bool((spread.low <= spread.high).all())
    assert float((scores(found, one) - before).abs().max()) > 1e-5
    found.unmerge()
    assert not found.merged_approximately
    assert torch.equal(scores(found, one), before)


def test_a_static_gate_is_merged_exactly():
    found, one = adapted("ilora", control="static_gate"), batch()
    before = scores(found, one)
    assert found.merge() is None
    torch.testing.assert_close(scores(found, one), before, rtol=1e-4, atol=1e-4)


def test_controls_take_something_away():
    one = batch()
    model = adapted("ilora")
    own = scores(model, one)
    for control in ("shuffled_user", "noise", "static_gate"):
        other = copied(model, adapted("ilora", control=control))
        assert float((scores(other, one) - own).abs().max()) > 1e-4, control
    fixed = adapted("ilora", control="fixed_gate")
    assert not fixed.gates["default"].linear.weight.requires_grad
    again = adapted("ilora", control="fixed_gate")
    assert torch.equal(fixed.gates["default"].linear.weight, again.gates["default"].linear.weight)


# -- bad input -----------------------------------------------------------------------------------------------


def test_a_configuration_that_cannot_be_is_told():
    for given_, said in [
        ({"kind": "ilora", "rank": 6}, "rank=6 must be divisible by num_experts=4"),
        ({"kind": "dora"}, "'kind' is 'dora'"),
        ({"targets": ()}, "targets is empty"),
        ({"control": "noise"}, "control='noise' is one of kind='ilora', not of 'lora'"),
        ({"r": 8}, "unknown parameter 'r'"),
    ]:
        with pytest.raises(InputError, match=said):
            validated(AdapterConfig, given_)


def test_a_target_that_matches_no_module_is_told():
    for target in ["qvk", "blocks.7.ffn.up", "norm"]:
        with pytest.raises(
            InputError, match=rf"target '{target}' matches no module of this model; allowed: qkv"
        ):
            AdaptedModel(base()).add("x", AdapterConfig(targets=(target,)))


def test_other_mistakes_are_told():
    found = adapted("lora")
    with pytest.raises(InputError, match="adapter 'default' is in use"):
        found.add("default", AdapterConfig())
    with pytest.raises(InputError, match=r"adapter 'a\.b' is no name"):
        found.add("a.b", AdapterConfig())
    with pytest.raises(InputError, match="unknown adapter 'june'; there are: default"):
        found.use("june")
    with pytest.raises(InputError, match="has no gate on the instance"):
        found.expert_weights(*rows_of(batch()))
    with pytest.raises(InputError, match="needs causal_model"):
        found.add("c", AdapterConfig(kind="ilora", representation="causal_state"))
    config = AdapterConfig(kind="ilora", representation="causal_state")
    with pytest.raises(InputError, match="causal_model knows 5 items"):
        found.add("c", config, Bert4Rec(ModelConfig(num_items=5, hidden_dim=16, causal=True)))
    found.merge()
    with pytest.raises(InputError, match="is merged: unmerge it"):
        found.use(None)
    with pytest.raises(InputError, match="nothing to merge"):
        found.merge()
    with pytest.raises(InputError, match="tied"):
        adapted("lora", base(), targets=("item_table",)).merge()
