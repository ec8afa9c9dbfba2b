"""Losses over sampled items: against the full softmax, against their formulas, and what they touch."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import NUM_ITEMS, histories, small_model

from reclib.config import InputError, TrainConfig, validated
from reclib.data.batches import IGNORE, Epoch
from reclib.train.losses import cross_entropy_sum, gbce, sampled_sum, softmax_losses

ITEMS = 10


def made(negatives: list[int], probs: list[float]):
    """A batch of four targets, one of them a filler, and a random head."""
    (batch,) = Epoch(histories([6]), small_model(), TrainConfig(batch_size=1), 0).step(0)
    torch.manual_seed(0)
    batch = batch._replace(
        targets=torch.tensor([3, 10, IGNORE, 1]),
        negatives=torch.tensor(negatives),
        negative_probs=torch.tensor(probs, dtype=torch.float64),
    )
    sizes = (4, 6), (12, 6), (12,)
    head = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes]
    return batch, head


def test_every_item_drawn_once_is_the_full_softmax():
    batch, head = made(list(range(1, ITEMS + 1)), [1 / ITEMS] * ITEMS)
    found = sampled_sum(*head, batch, ITEMS, TrainConfig(loss="sampled_softmax"))
    wanted = cross_entropy_sum(*head, batch.targets, ITEMS, "plain")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, head), torch.autograd.grad(wanted, head))


def test_with_logq_the_partition_is_estimated_without_bias_whatever_is_drawn_often():
    torch.manual_seed(1)
    scores = torch.randn(ITEMS, dtype=torch.float64)
    odds = torch.rand(ITEMS, dtype=torch.float64) ** 3 + 0.01
    odds /= odds.sum()
    drawn = torch.multinomial(odds, 200_000, replacement=True)
    target = 4
    log_weight = -torch.log(len(drawn) * odds[drawn])
    loss = softmax_losses(scores[target][None], scores[drawn][None], (drawn == target)[None], log_weight)
    assert float(loss) == pytest.approx(float(-scores.log_softmax(0)[target]), abs=0.02)
    naive = softmax_losses(scores[target][None], scores[drawn][None], (drawn == target)[None], None)
    assert abs(float(naive) - float(loss)) > 1


def test_a_drawn_target_is_no_negative_of_itself():
    batch, (hidden, weight, bias) = made([3, 5], [0.1, 0.1])
    one = batch._replace(targets=torch.tensor([3]))
    config = TrainConfig(loss="sampled_softmax", logq=False)
    found = sampled_sum(hidden[:1], weight, bias, one, ITEMS, config)
    scores = hidden[:1] @ weight.T + bias
    wanted = F.cross_entropy(scores[:, [3, 5]], torch.tensor([0]))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_the_papers_formula(t):
    positive = torch.tensor([0.3, -1.2], dtype=torch.float64)
    scores = torch.tensor([[0.5, -0.5, 2.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    clash = torch.tensor([[False, True, False], [False, False, False]])
    rate = 3 / (ITEMS - 1)
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    wanted = [
        -(beta * math.log(1 / (1 + math.exp(-p))) + sum(math.log(1 - 1 / (1 + math.exp(-s))) for s in row))
        for p, row in [(0.3, [0.5, 2.0]), (-1.2, [0.1, 0.2, 0.3])]
    ]
    assert gbce(positive, scores, clash, ITEMS, t).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("loss", ["sampled_softmax", "gbce"])
def test_only_drawn_items_and_targets_learn(loss):
    batch, head = made([2, 7], [0.1, 0.1])
    sampled_sum(*head, batch, ITEMS, TrainConfig(loss=loss)).backward()
    touched = head[1].grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 2, 3, 7, 10]
    assert (head[0].grad[2] == 0).all()  # the filler


def test_micro_batches_share_a_steps_negatives():
    config = TrainConfig(batch_size=4, micro_batch_size=2, loss="gbce", num_negatives=16)
    first, second = Epoch(histories([5, 6, 7, 8]), small_model(), config, 0).step(0)
    assert first.negatives.tolist() == second.negatives.tolist()
    assert len(first.negatives) == 16
    assert 1 <= int(first.negatives.min()) <= int(first.negatives.max()) <= NUM_ITEMS


def test_a_sampled_loss_does_not_go_with_what_needs_all_scores():
    focal = {"objective": "seed_focal", "layout": "padded", "loss": "sampled_softmax"}
    for settings, message in (
        ({"loss": "gbce", "head_rows": "all"}, "needs loss='plain', not 'gbce'"),
        (focal, "knows no loss='sampled_softmax'"),
    ):
        with pytest.raises(InputError, match=message):
            validated(TrainConfig, settings)
