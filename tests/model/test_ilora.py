"""Adapters: nothing is bypassed, kinds are what they say, and frozen weights cost nothing."""

import pytest
import torch
from adapting import EVERYTHING, KINDS, UNTIED, adapted, base, batch, rows_of, scores, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from reclib.config import AdapterConfig, InputError, ModelConfig, TrainConfig, changed, validated
from reclib.data.batches import Batch
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, base_hash
from reclib.model.lora import LowRank
from reclib.train import losses
from reclib.train.losses import batch_loss

TRAIN = TrainConfig(batch_size=8, epochs=2, mask_prob=0.3, lr_warmup_steps=1, learning_rate=1e-2)
LENGTHS = [9, 4, 12, 7, 3, 8, 5, 6]
NEAR = {"rtol": 1e-4, "atol": 1e-5}
close = torch.testing.assert_close


def loss_of(model: AdaptedModel | Bert4Rec, one: Batch, **changes: object) -> torch.Tensor:
    return batch_loss(model, one, changed(TRAIN, **changes), one.num_targets)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def trained_names(model: AdaptedModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


# -- nothing is bypassed -------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing():
    for kind in KINDS:
        for shape in (UNTIED, {"norm": "post", "positions": "sinusoidal"}, {"table_dim": 12}):
            model, one = base(**shape), batch()
            before = scores(model, one)
            found = AdaptedModel(model)
            found.add("new", AdapterConfig(kind=kind, targets=EVERYTHING))
            close(scores(found, one), before, rtol=0, atol=1e-6)


def test_every_adapter_and_the_gate_have_a_gradient_and_nothing_else_has():
    for kind in KINDS:
        found, one = adapted(kind, targets=EVERYTHING), batch()
        before = scores(found, one)
        close(scores(found, one, everywhere=True), before, **NEAR)
        assert torch.equal(scores(found.train(), one), before)
        assert len(trained_names(found)) == 11 * 2 + {"gated": 11, "ilora": 1}.get(kind, 0)
        loss_of(found, one).backward()
        for name, parameter in found.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
            assert parameter.grad is None or float(parameter.grad.abs().max()) > 0, name


# -- kinds are what they say ---------------------------------------------------------------------------------


@given(rank=st.sampled_from([(4, 1), (4, 2), (8, 4), (6, 3), (8, 8)]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_sum_over_experts_is_one_product(rank, seed):
    r, K = rank
    torch.manual_seed(seed)
    config = AdapterConfig(kind="ilora", rank=r, num_experts=K, alpha=6.0)
    layer = LowRank(5, 7, config)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, g, each = torch.randn(2, 3, 5), torch.randn(2, 3, K).softmax(-1), r // K
    A, B = layer.lora_A.weight.split(each), layer.lora_B.weight.split(each, 1)
    wanted = sum(6.0 / each * g[..., k, None] * (x @ A[k].t() @ B[k].t()) for k in range(K))
    factors = g.repeat_interleave(each, -1) * config.scaling
    close(layer.added_to(torch.zeros(2, 3, 7), x, factors, slice(None)), wanted, **NEAR)


@torch.no_grad()
def copied(source: AdaptedModel, target: AdaptedModel) -> AdaptedModel:
    """Give the adapters of one model the weights of the other's, gates apart."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
    return target


def test_other_kinds_are_lora_where_their_factor_is_the_same():
    one, plain = batch(), adapted("lora", targets=EVERYTHING, alpha=12.0)
    near = {"rtol": 1e-5, "atol": 1e-5}
    uniform = copied(plain, adapted("ilora", targets=EVERYTHING, alpha=12.0))
    assert gap(scores(uniform, one), scores(plain, one)) > 1e-3
    torch.nn.init.zeros_(uniform.gates["default"].linear.weight)
    close(scores(uniform, one), scores(plain, one), **near)
    stable = copied(plain, adapted("rslora", targets=EVERYTHING, alpha=12.0 / 8**0.5))
    close(scores(stable, one), scores(plain, one), **near)
    halved = copied(plain, adapted("gated", targets=EVERYTHING, alpha=24.0))
    for name, parameter in halved.named_parameters():
        if name.endswith("lora_gate"):
            torch.nn.init.zeros_(parameter)  # sigmoid(0) is a half
    close(scores(halved, one), scores(plain, one), **near)


def test_packed_equals_padded():
    packed, padded = batch(), batch(layout="padded")
    assert packed.items.shape[0] < padded.items.shape[0]
    for control in ("none", "noise", "fixed_gate", "static_gate"):
        found = adapted("ilora", targets=EVERYTHING, control=control)
        by_target = []
        for one in (packed, padded):
            segments = one.segment_ids.flatten()[one.target_places[: one.num_targets]]
            by_target.append(scores(found, one)[segments.argsort(stable=True)])
        close(*by_target, **NEAR)


@torch.no_grad()
def test_experts_share_one_weight_and_queries_are_not_taken_for_places():
    found, one = adapted("ilora", targets=EVERYTHING), batch()
    weights = found.expert_weights(*rows_of(one))
    close(weights.sum(-1), torch.ones(weights.shape[:2]))
    R, L = one.items.shape  # as many queries as places
    states = found.encode(*rows_of(one), torch.arange(L - 1, -1, -1).expand(R, -1))
    assert states.shape[:2] == (R, L)
    close(states.flip(1), found.encode(*rows_of(one)), **NEAR)


def test_a_gate_on_states_is_trained_while_they_stay_as_they_are():
    for representation in ("base_state", "causal_state"):
        reader = base(seed=7, causal=True)
        found = AdaptedModel(base(**UNTIED, dropout=0.5))
        found.add("x", AdapterConfig(kind="ilora", representation=representation), reader)
        stir(found).train()
        before = found.expert_weights(*rows_of(batch())).detach()
        loss_of(found, batch()).backward()
        assert float(found.gates["x"].linear.weight.grad.abs().max()) > 0
        assert all(p.grad is None for p in (*found.twin.parameters(), *reader.parameters()))
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(found.expert_weights(*rows_of(batch())), before)  # without dropout


# -- compiled, in threads, by the trainer --------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_is_eager():
    """In one graph: the gate leaves no break in it."""
    found, one = adapted("ilora", targets=EVERYTHING).train(), batch()
    compiled = torch.compile(found.encode, backend="eager", dynamic=True, fullgraph=True)
    rows, gradients = (*rows_of(one), one.query_index), []
    for encode in (found.encode, compiled):
        found.zero_grad()
        batch_loss(found, one, TRAIN, one.num_targets, encode).backward()
        gradients.append({n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None})
    close(compiled(*rows), found.encode(*rows), **NEAR)
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


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
    found = adapted("ilora", base(**shape), rank=4, num_experts=2)
    adapters = products(found, False) - forward
    assert 0 < adapters < 0.3 * forward
    assert products(base(**shape).requires_grad_(True), True) > 2.8 * forward
    assert products(found.train(), True) <= 2 * forward + 3 * adapters


def test_an_adapted_output_table_has_no_product_for_the_frozen_part(monkeypatch):
    """And its gradients are those of autograd's own product, which knows nothing of frozen columns."""
    computed = AdaptedModel.frozen_columns
    monkeypatch.setattr(losses, "LARGE_LOGITS_BYTES", 1)  # several chunks
    one = batch(tuple(LENGTHS * 4))
    assert len(one.targets) > 16
    for kind, loss, output_bias in [
        *(("ilora", loss, bias) for loss in ("inplace", "plain", "chunked") for bias in (True, False)),
        ("lora", "inplace", True),
    ]:
        model = base(**UNTIED, output_bias=output_bias)
        found = adapted(kind, model, targets=("head",), rank=4, num_experts=2).train()
        if output_bias:
            model.output_bias.requires_grad_(True)

        def step(route: str, dtype: torch.dtype = torch.float32, found=found) -> tuple[int, dict]:
            found.zero_grad()
            with FlopCounterMode(display=False) as counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = 3 * loss_of(found, one, loss=route)
                value.backward()
            grads = {n: p.grad.clone() for n, p in found.named_parameters() if p.grad is not None}
            return counter.get_total_flops(), grads

        products, gradients = step(loss)
        assert step(loss, torch.bfloat16)[0] == products  # in 16 bits as well
        monkeypatch.setattr(AdaptedModel, "frozen_columns", 0)
        more, wanted = step("plain")
        monkeypatch.setattr(AdaptedModel, "frozen_columns", computed)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
        assert more - products >= 2 * len(one.targets) * found.config.num_items * found.config.hidden_dim


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
        adapters = {n.split(".adapters.")[1].split(".")[0] for n in trained_names(found) if "gates" not in n}
        assert adapters == ({name} if name else set())
    for name in (None, "new"):
        close(answers[name], plain, rtol=0, atol=1e-6)
    assert gap(answers["june"], answers["july"]) > 1e-2
    found.delete("june")
    assert torch.equal(scores(found, one), answers["july"])
    found.delete("july")
    assert found.unload() is model
    assert torch.equal(scores(model, one), plain)


def test_merging_is_exact_or_refused():
    one = batch()
    for kind, changes in (*((kind, {}) for kind in KINDS[:3]), ("ilora", {"control": "static_gate"})):
        found = adapted(kind, targets=EVERYTHING, **changes)
        before = scores(found, one)
        plain = found.merge_and_unload()
        assert plain.state_dict().keys() == base(**UNTIED).state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters())
        close(scores(plain, one), before, rtol=1e-4, atol=1e-4)
    rounded, none = adapted("lora"), adapted("lora")
    rounded.hold_frozen(torch.bfloat16)
    none.use(None)
    for found, why in (
        (adapted("ilora"), "its gate differs from user to user"),
        (rounded, "held in 16 bits"),
        (adapted("lora", base(), targets=("item_table",)), "tied"),
        (none, "nothing to merge"),
    ):
        with pytest.raises(InputError, match=why):
            found.merge_and_unload()
        assert base_hash(found.twin) == found.base_sha256 or found is rounded


# -- bad input -----------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    found = adapted("lora")
    causal = AdapterConfig(kind="ilora", representation="causal_state")
    small = Bert4Rec(ModelConfig(num_items=5, hidden_dim=16, causal=True))
    for call, message in (
        (lambda: validated(AdapterConfig, {"kind": "ilora", "rank": 6}), "rank=6 must be .* num_experts=4"),
        (
            lambda: validated(AdapterConfig, {"control": "noise"}),
            "'noise' is one of kind='ilora', not of 'lora'",
        ),
        (
            lambda: found.add("x", AdapterConfig(targets=("qvk",))),
            r"target 'qvk' matches no .*; allowed: qkv",
        ),
        (lambda: found.add("default", AdapterConfig()), "adapter name 'default'.*in use: default"),
        (lambda: found.use("june"), "unknown adapter 'june'; there are: default"),
        (lambda: found.add("c", causal), "needs causal_model"),
        (lambda: found.add("c", causal, small), "causal_model knows 5 items"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert list(found.configs) == ["default"]
