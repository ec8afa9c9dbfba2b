"""Adapters: nothing is bypassed, kinds are what they say, frozen weights cost nothing; what a gate sees."""

import numpy as np
import pytest
import torch
from adapting import EVERYTHING, KINDS, UNTIED, adapted, base, batch, rows_of, scores, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, small_model
from torch.utils.flop_counter import FlopCounterMode

from reclib.config import PAD, AdapterConfig, InputError, ModelConfig, TrainConfig, changed, validated
from reclib.data.batches import Batch, Epoch
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, Representation, Rows, base_hash, visible_prefixes
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


def test_several_adapters_on_one_base_chosen_per_batch():
    model, one = base(**UNTIED), batch()
    plain = scores(model, one)
    found = AdaptedModel(model)
    for seed, (name, kind) in enumerate({"june": "lora", "july": "ilora", "new": "lora"}.items()):
        found.add(name, AdapterConfig(kind=kind, targets=("qkv",) if name == "june" else EVERYTHING))
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


def test_mistakes_are_named():
    found = adapted("lora")
    causal = AdapterConfig(kind="ilora", representation="causal_state")
    small = Bert4Rec(ModelConfig(num_items=5, hidden_dim=16, causal=True))
    for call, message in (
        (lambda: validated(AdapterConfig, {"kind": "ilora", "rank": 6}), "rank=6 must be .* num_experts=4"),
        (lambda: validated(AdapterConfig, {"control": "noise"}), "is one of kind='ilora', not of 'lora'"),
        (lambda: found.add("x", AdapterConfig(targets=("qvk",))), "target 'qvk' matches no .*; allowed: qkv"),
        (lambda: found.add("default", AdapterConfig()), "adapter name 'default'.*in use: default"),
        (lambda: found.use("june"), "unknown adapter 'june'; there are: default"),
        (lambda: found.add("c", causal), "needs causal_model"),
        (lambda: found.add("c", causal, small), "causal_model knows 5 items"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert list(found.configs) == ["default"]


MASK = NUM_ITEMS + 1
CAUSAL = base(seed=5, causal=True)


def row(*segments: list[int], length: int = 12) -> Rows:
    """One packed row of these segments."""
    items, ids, positions = [], [], []
    for number, segment in enumerate(segments, 1):
        items += segment
        ids += [number] * len(segment)
        positions += range(len(segment))
    spare = [0] * (length - len(items))
    return Rows(*(torch.tensor([values + spare]) for values in (items, ids, positions)))


def form(name: str = "mean_embedding", control: str = "none", of: Bert4Rec | None = None) -> Representation:
    """What a gate reads; `of` is the base if it is no small model that sees both sides."""
    config = AdapterConfig(kind="ilora", representation=name, control=control)
    return Representation(config, small_model() if of is None else of.config, CAUSAL).eval()


def forms(**more: object) -> list[Representation]:
    return [form(**more), form("base_state", **more), form(control="noise", **more)]


def test_the_target_cannot_reach_the_gate():
    """Packed rows whose targets are other items, or whose one visible item is another."""
    train = TrainConfig(batch_size=8, mask_prob=0.3)
    plan = Epoch(histories([9, 4, 12, 7, 3, 8, 5, 6]), small_model(), train, 0)
    samples = plan.samples(0)
    a_visible_one = np.arange(len(samples.tokens)) == np.flatnonzero(~samples.is_target)[0]
    rows = []
    for other in (np.zeros_like(a_visible_one), samples.is_target, a_visible_one):
        items = np.where(other, samples.labels % NUM_ITEMS + 1, samples.labels)
        changed_samples = samples._replace(tokens=items, labels=items).masked(MASK)
        rows.append(Rows(*rows_of(plan.layout.batch(changed_samples, *plan.placed(0)))))
    for one in (*forms(), form("causal_state"), form(control="shuffled_user")):
        before, same, another = (one.train()(base(**UNTIED), given) for given in rows)
        assert torch.equal(same, before)
        assert not torch.equal(another, before)


def test_a_segment_sees_itself_alone():
    model = base(**UNTIED)
    for one in forms():
        before = one(model, row([3, MASK, 5], [7, 8, MASK, 9]))
        after = one(model, row([3, MASK, 6], [7, 8, MASK, 9]))
        assert torch.equal(before[0, 3:7], after[0, 3:7])
        assert float((before[0, :3] - after[0, :3]).abs().max()) > 1e-3
        assert torch.equal(before[0, :3], before[0, :1].expand(3, -1))  # one vector a segment
        alone = one(model, row([7, 8, MASK, 9]))
        torch.testing.assert_close(before[0, 3], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_in_a_causal_model_what_is_later_does_not_reach_a_place():
    for one in forms(of=CAUSAL):
        before, after = one(CAUSAL, row([3, 4, 5, 6])), one(CAUSAL, row([3, 4, 9, 6]))
        torch.testing.assert_close(before[0, :2], after[0, :2])
        assert float((before[0, 2:4] - after[0, 2:4]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="shuffled_user"):
        form(control="shuffled_user", of=CAUSAL)


def test_the_mean_is_that_of_the_visible_items_and_zero_without_any():
    model = base()
    z = form()(model, row([3, MASK, 5], [7], [MASK]))[0]
    table = model.item_table.weight
    torch.testing.assert_close(z[1], (table[3] + table[5]) / 2)
    torch.testing.assert_close(z[3], table[7])
    assert float(z[4:].abs().max()) == 0


SEGMENT = st.lists(st.integers(1, NUM_ITEMS) | st.just(MASK), min_size=1, max_size=6)


@given(st.lists(SEGMENT, min_size=1, max_size=2))
@settings(max_examples=60, deadline=None)
def test_visible_items_move_together_and_mask_follows(segments):
    laid, read = visible_prefixes(row(*segments), CAUSAL, causal=False)
    start = 0
    for segment in segments:
        wanted = [*(item for item in segment if item != MASK), MASK][: len(segment)]
        found = laid.items[0, start : start + len(segment)].tolist()
        assert found == wanted + [PAD] * (len(segment) - len(wanted))
        assert read[0, start].item() == start + len(wanted) - 1
        assert laid.positions[0, start : start + len(wanted)].tolist() == list(range(len(wanted)))
        start += len(segment)


def test_a_model_is_read_at_mask_after_the_visible_items_and_a_causal_one_at_the_last_of_them():
    def state(model: Bert4Rec, items: list[int], positions: list[int]) -> torch.Tensor:
        asked = torch.tensor([items])
        return model.encode(asked, torch.ones_like(asked), torch.tensor([positions]))[0, -1]

    near = {"rtol": 1e-5, "atol": 1e-6}
    for origin, positions in (("first", [0, 1, 2, 3]), ("last", [3, 2, 1, 0])):
        model = base(position_origin=origin)
        z = form("base_state")(model, row([3, MASK, 5, 4, MASK], [7, MASK]))
        torch.testing.assert_close(z[0, 0], state(model, [3, 5, 4, MASK], positions), **near)
    z = form("causal_state")(base(), row([3, MASK, 5, MASK], [MASK]))
    torch.testing.assert_close(z[0, 0], state(CAUSAL, [3, 5], [0, 1]), **near)
    torch.testing.assert_close(z[0, 4], state(CAUSAL, [MASK], [0]), **near)


def test_states_are_kept_where_the_same_rows_come_again(monkeypatch):
    model, one, rows = base(), form("base_state"), row([3, MASK, 5], [7, 8, MASK])
    first = one(model, rows)
    monkeypatch.setattr(model, "encode", None)
    assert torch.equal(one(model, rows), first)
    for again, given_ in ((one, row([4, MASK, 5], [7, 8, MASK])), (one.train(), rows)):
        with pytest.raises(TypeError):
            again(model, given_)


def test_controls_noise_can_be_repeated_and_segments_exchange_their_vectors():
    model, noise = base(hidden_dim=64), form(control="noise")
    rows = [row([i, MASK, i + 1], [i + 1, MASK]) for i in range(1, NUM_ITEMS)]
    values = torch.stack([noise(model, one)[0, 0] for one in rows])
    assert abs(float(values.mean())) < 0.1
    assert float(values.std()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(values[0], noise(model, rows[0])[0, 0])
    assert abs(float(torch.corrcoef(values)[0, 1:].abs().max())) < 0.6
    assert form(control="static_gate")(model, rows[0]).unique().tolist() == [1.0]
    packed, model = Rows(*rows_of(batch())), base()
    own, other = form()(model, packed), form(control="shuffled_user")(model, packed)
    assert float((own - other)[packed.segment_ids > 0].norm(dim=-1).min()) > 1e-3  # nobody keeps its own
    segments = [packed.segment_ids == s for s in packed.segment_ids.unique() if s > 0]
    assert all(len(other[places].unique(dim=0)) == 1 for places in segments)
    one_each = [torch.cat([z[places][:1] for places in segments]).sort(0).values for z in (own, other)]
    torch.testing.assert_close(*one_each)  # a permutation of what there was
