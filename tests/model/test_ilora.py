"""Adapters: nothing is bypassed, kinds are what they say, frozen weights cost nothing; what a gate sees."""

import numpy as np
import pytest
import torch
from adapting import EVERYTHING, KINDS, UNTIED, adapted, base, first_batch, rows_of, scores, stir
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, small_model
from torch.utils.flop_counter import FlopCounterMode

from reclib.config import PAD, AdapterConfig, ModelConfig, TrainConfig, changed, validated
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


def loss_of(model: AdaptedModel | Bert4Rec, batch: Batch, **changes: object) -> torch.Tensor:
    return batch_loss(model, batch, changed(TRAIN, **changes), batch.num_targets)


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def trained_names(model: AdaptedModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_every_adapter_and_the_gate_have_a_gradient_and_nothing_else_has():
    for kind in KINDS:
        model, batch = adapted(kind, targets=EVERYTHING), first_batch()
        before = scores(model, batch)
        close(scores(model, batch, everywhere=True), before, **NEAR)
        assert torch.equal(scores(model.train(), batch), before)
        assert len(trained_names(model)) == 11 * 2 + {"gated": 11, "ilora": 1}.get(kind, 0)
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
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
    batch, plain = first_batch(), adapted("lora", targets=EVERYTHING, alpha=12.0)
    uniform = copied(plain, adapted("ilora", targets=EVERYTHING, alpha=12.0))
    assert gap(scores(uniform, batch), scores(plain, batch)) > 1e-3
    torch.nn.init.zeros_(uniform.gates["default"].linear.weight)
    stable = copied(plain, adapted("rslora", targets=EVERYTHING, alpha=12.0 / 8**0.5))
    halved = copied(plain, adapted("gated", targets=EVERYTHING, alpha=24.0))
    for name, parameter in halved.named_parameters():
        if name.endswith("lora_gate"):
            torch.nn.init.zeros_(parameter)  # sigmoid(0) is a half
    for other in (uniform, stable, halved):
        close(scores(other, batch), scores(plain, batch), rtol=1e-5, atol=1e-5)


def test_packed_equals_padded():
    packed, padded = first_batch(), first_batch(layout="padded")
    assert packed.items.shape[0] < padded.items.shape[0]
    for control in ("none", "noise", "fixed_gate", "static_gate"):
        model = adapted("ilora", targets=EVERYTHING, control=control)
        by_target = []
        for batch in (packed, padded):
            segments = batch.segment_ids.flatten()[batch.target_places[: batch.num_targets]]
            by_target.append(scores(model, batch)[segments.argsort(stable=True)])
        close(*by_target, **NEAR)


@torch.no_grad()
def test_experts_share_one_weight_and_queries_are_not_taken_for_places():
    model, batch = adapted("ilora", targets=EVERYTHING), first_batch()
    close(model.expert_weights(*rows_of(batch)).sum(-1), torch.ones(batch.items.shape))
    R, L = batch.items.shape  # as many queries as places
    states = model.encode(*rows_of(batch), torch.arange(L - 1, -1, -1).expand(R, -1))
    assert states.shape[:2] == (R, L)
    close(states.flip(1), model.encode(*rows_of(batch)), **NEAR)


def test_a_gate_on_states_is_trained_while_they_stay_as_they_are():
    for representation in ("base_state", "causal_state"):
        reader = base(seed=7, causal=True)
        model = AdaptedModel(base(**UNTIED, dropout=0.5))
        model.add("x", AdapterConfig(kind="ilora", representation=representation), reader)
        stir(model).train()
        before = model.expert_weights(*rows_of(first_batch())).detach()
        loss_of(model, first_batch()).backward()
        assert float(model.gates["x"].linear.weight.grad.abs().max()) > 0
        assert all(p.grad is None for p in (*model.twin.parameters(), *reader.parameters()))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        assert torch.equal(model.expert_weights(*rows_of(first_batch())), before)  # without dropout


@pytest.mark.slow
def test_compiled_is_eager():
    """In one graph: the gate leaves no break in it."""
    model, batch = adapted("ilora", targets=EVERYTHING).train(), first_batch()
    compiled = torch.compile(model.encode, backend="eager", dynamic=True, fullgraph=True)
    rows, gradients = (*rows_of(batch), batch.query_index), []
    for encode in (model.encode, compiled):
        model.zero_grad()
        batch_loss(model, batch, TRAIN, batch.num_targets, encode).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    close(compiled(*rows), model.encode(*rows), **NEAR)
    close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_an_adapted_output_table_has_no_product_for_the_frozen_part(monkeypatch):
    """And its gradients are those of autograd's own product, which knows nothing of frozen columns."""
    monkeypatch.setattr(losses, "LARGE_LOGITS_BYTES", 1)  # several chunks
    batch = first_batch(tuple(LENGTHS * 4))
    assert len(batch.targets) > 16
    for kind, route, output_bias in [
        *(("ilora", route, bias) for route in ("inplace", "plain", "chunked") for bias in (True, False)),
        ("lora", "inplace", True),
    ]:
        network = base(**UNTIED, output_bias=output_bias)
        model = adapted(kind, network, targets=("head",), rank=4, num_experts=2).train()
        if output_bias:
            network.output_bias.requires_grad_(True)

        def step(route: str, dtype: torch.dtype = torch.float32, model=model) -> tuple[int, dict]:
            model.zero_grad()
            with FlopCounterMode(display=False) as counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = 3 * loss_of(model, batch, loss=route)
                loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return counter.get_total_flops(), gradients

        products, gradients = step(route)
        assert step(route, torch.bfloat16)[0] == products  # in 16 bits as well
        with monkeypatch.context() as patch:
            patch.setattr(AdaptedModel, "frozen_columns", 0)
            more, wanted = step("plain")
        close(gradients, wanted, rtol=1e-4, atol=1e-6)
        assert more - products >= 2 * len(batch.targets) * model.config.num_items * model.config.hidden_dim


def test_frozen_weights_can_be_held_in_the_precision_of_the_products():
    model, batch = adapted("ilora", targets=EVERYTHING), first_batch()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_of(model, batch)
        model.hold_frozen(torch.bfloat16)
        held = loss_of(model, batch)
        held.backward()
    assert model.base.item_table.weight.dtype == torch.bfloat16
    assert held.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_several_adapters_on_one_base_chosen_per_batch():
    network, batch = base(**UNTIED), first_batch()
    plain, model = scores(network, batch), AdaptedModel(network)
    for seed, (name, kind) in enumerate({"june": "lora", "july": "ilora", "new": "lora"}.items()):
        model.add(name, AdapterConfig(kind=kind, targets=("qkv",) if name == "june" else EVERYTHING))
        if name != "new":
            stir(model, seed)
    answers = {}
    for name in ("june", "july", "new", None, "june", "july"):
        model.use(name)
        answers.setdefault(name, scores(model, batch))
        assert torch.equal(scores(model, batch), answers[name])
        adapters = {n.split(".adapters.")[1].split(".")[0] for n in trained_names(model) if "gates" not in n}
        assert adapters == ({name} if name else set())
    for name in (None, "new"):
        close(answers[name], plain, rtol=0, atol=1e-6)
    assert gap(answers["june"], answers["july"]) > 1e-2
    model.delete("june")
    assert torch.equal(scores(model, batch), answers["july"])
    model.delete("july")
    assert model.unload() is network
    assert torch.equal(scores(network, batch), plain)


def test_merging_is_exact_or_refused():
    batch = first_batch()
    for kind, changes in (*((kind, {}) for kind in KINDS[:3]), ("ilora", {"control": "static_gate"})):
        model = adapted(kind, targets=EVERYTHING, **changes)
        before = scores(model, batch)
        plain = model.merge_and_unload()
        assert plain.state_dict().keys() == base(**UNTIED).state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters())
        close(scores(plain, batch), before, rtol=1e-4, atol=1e-4)
    rounded, none = adapted("lora"), adapted("lora")
    rounded.hold_frozen(torch.bfloat16)
    none.use(None)
    for model, why in (
        (adapted("ilora"), "its gate differs from user to user"),
        (rounded, "held in 16 bits"),
        (adapted("lora", base(), targets=("item_table",)), "tied"),
        (none, "nothing to merge"),
    ):
        refused(why, model.merge_and_unload)
        assert base_hash(model.twin) == model.base_sha256 or model is rounded


def test_mistakes_are_named():
    model = adapted("lora")
    causal = AdapterConfig(kind="ilora", representation="causal_state")
    small = Bert4Rec(ModelConfig(num_items=5, hidden_dim=16, causal=True))
    misspelt = AdapterConfig(targets=("qvk",))
    refused("rank=6 must be .* num_experts=4", validated, AdapterConfig, {"kind": "ilora", "rank": 6})
    refused("is one of kind='ilora', not of 'lora'", validated, AdapterConfig, {"control": "noise"})
    refused("target 'qvk' matches no .*; allowed: qkv", model.add, "x", misspelt)
    refused("adapter name 'default'.*in use: default", model.add, "default", AdapterConfig())
    refused("unknown adapter 'june'; there are: default", model.use, "june")
    refused("needs causal_model", model.add, "c", causal)
    refused("causal_model knows 5 items", model.add, "c", causal, small)
    assert list(model.configs) == ["default"]


MASK = NUM_ITEMS + 1
CAUSAL = base(seed=5, causal=True)


def row(*segments: list[int], length: int = 12) -> Rows:
    """One packed row of these segments."""
    places = [(item, n, k) for n, segment in enumerate(segments, 1) for k, item in enumerate(segment)]
    return Rows(*torch.tensor(places + [(0, 0, 0)] * (length - len(places))).T[:, None])


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
    for gate in (*forms(), form("causal_state"), form(control="shuffled_user")):
        before, same, another = (gate.train()(base(**UNTIED), given) for given in rows)
        assert torch.equal(same, before)
        assert not torch.equal(another, before)


def test_a_segment_sees_itself_alone():
    model = base(**UNTIED)
    for gate in forms():
        before, after = (gate(model, row([3, MASK, last], [7, 8, MASK, 9])) for last in (5, 6))
        assert torch.equal(before[0, 3:7], after[0, 3:7])
        assert gap(before[0, :3], after[0, :3]) > 1e-3
        assert torch.equal(before[0, :3], before[0, :1].expand(3, -1))  # one vector a segment
        alone = gate(model, row([7, 8, MASK, 9]))
        close(before[0, 3], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_in_a_causal_model_what_is_later_does_not_reach_a_place():
    for gate in forms(of=CAUSAL):
        before, after = (gate(CAUSAL, row([3, 4, third, 6])) for third in (5, 9))
        close(before[0, :2], after[0, :2])
        assert gap(before[0, 2:4], after[0, 2:4]) > 1e-3
    refused("shuffled_user", form, control="shuffled_user", of=CAUSAL)


def test_the_mean_is_that_of_the_visible_items_and_zero_without_any():
    model = base()
    z = form()(model, row([3, MASK, 5], [7], [MASK]))[0]
    table = model.item_table.weight
    close(z[1], (table[3] + table[5]) / 2)
    close(z[3], table[7])
    assert float(z[4:].abs().max()) == 0


SEGMENT = st.lists(st.integers(1, NUM_ITEMS) | st.just(MASK), min_size=1, max_size=6)


@given(st.lists(SEGMENT, min_size=1, max_size=2))
@settings(max_examples=60, deadline=None)
def test_visible_items_move_together_and_mask_follows(segments):
    laid, read = visible_prefixes(row(*segments), CAUSAL, causal=False)
    start = 0
    for segment in segments:
        wanted = [*(item for item in segment if item != MASK), MASK][: len(segment)]
        items = laid.items[0, start : start + len(segment)].tolist()
        assert items == wanted + [PAD] * (len(segment) - len(wanted))
        assert read[0, start].item() == start + len(wanted) - 1
        assert laid.positions[0, start : start + len(wanted)].tolist() == list(range(len(wanted)))
        start += len(segment)


def test_a_model_is_read_at_mask_after_the_visible_items_and_a_causal_one_at_the_last_of_them():
    def state(model: Bert4Rec, items: list[int], positions: list[int]) -> torch.Tensor:
        tensor = torch.tensor([items])
        return model.encode(tensor, torch.ones_like(tensor), torch.tensor([positions]))[0, -1]

    near = {"rtol": 1e-5, "atol": 1e-6}
    for origin, positions in (("first", [0, 1, 2, 3]), ("last", [3, 2, 1, 0])):
        model = base(position_origin=origin)
        z = form("base_state")(model, row([3, MASK, 5, 4, MASK], [7, MASK]))
        close(z[0, 0], state(model, [3, 5, 4, MASK], positions), **near)
    z = form("causal_state")(base(), row([3, MASK, 5, MASK], [MASK]))
    close(z[0, 0], state(CAUSAL, [3, 5], [0, 1]), **near)
    close(z[0, 4], state(CAUSAL, [MASK], [0]), **near)


def test_states_are_kept_where_the_same_rows_come_again(monkeypatch):
    model, gate, rows = base(), form("base_state"), row([3, MASK, 5], [7, 8, MASK])
    first = gate(model, rows)
    monkeypatch.setattr(model, "encode", None)
    assert torch.equal(gate(model, rows), first)
    with pytest.raises(TypeError):
        gate(model, row([4, MASK, 5], [7, 8, MASK]))
    with pytest.raises(TypeError):
        gate.train()(model, rows)


def test_controls_noise_can_be_repeated_and_segments_exchange_their_vectors():
    model, noise = base(hidden_dim=64), form(control="noise")
    rows = [row([i, MASK, i + 1], [i + 1, MASK]) for i in range(1, NUM_ITEMS)]
    values = torch.stack([noise(model, each)[0, 0] for each in rows])
    assert abs(float(values.mean())) < 0.1
    assert float(values.std()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(values[0], noise(model, rows[0])[0, 0])
    assert abs(float(torch.corrcoef(values)[0, 1:].abs().max())) < 0.6
    assert form(control="static_gate")(model, rows[0]).unique().tolist() == [1.0]
    packed, model = Rows(*rows_of(first_batch())), base()
    own, other = form()(model, packed), form(control="shuffled_user")(model, packed)
    assert float((own - other)[packed.segment_ids > 0].norm(dim=-1).min()) > 1e-3  # nobody keeps its own
    segments = [packed.segment_ids == s for s in packed.segment_ids.unique() if s > 0]
    assert all(len(other[places].unique(dim=0)) == 1 for places in segments)
    vectors = [torch.cat([z[places][:1] for places in segments]).sort(0).values for z in (own, other)]
    close(*vectors)  # a permutation of what there was
