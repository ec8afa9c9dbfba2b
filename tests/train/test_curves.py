from __future__ import annotations

import time

import pytest

from reclib import hardware
from reclib.config import ModelConfig, TrainConfig
from reclib.data.prepare import synthetic_dataset
from reclib.train.fit import Curves, Options, fit
from reclib.train.trainer import CHECK_EVERY

CPU = hardware.resolve("cpu")
ASKED_FOR = {  # what people look for in a tracker
    *("train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens_per_second"),
    *("train/sequences_per_second", "run/peak_memory_bytes", "run/epoch", "run/train_seconds"),
    *("valid/loss", "valid/hr@10", "valid/ndcg@10", "valid/mrr"),
}


class Kept:
    """A tracker that can be looked at."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def close(self, failed):
        pass


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of 4 steps an epoch, killed after its first evaluation and carried on."""
    dataset = synthetic_dataset(num_users=60, num_items=40, mean_len=9.0, seed=0)
    model = ModelConfig(num_items=dataset.num_items, hidden_dim=8, num_layers=1, num_heads=1, max_len=16)
    config = TrainConfig(epochs=16, batch_size=16, eval_every=7, checkpoint_seconds=0.0)
    parts, folder = [Kept(), Kept()], tmp_path_factory.mktemp("run")
    seen, stats_of = [], {}
    for kept, last in zip(parts, (33, 10_000), strict=True):
        curves = Curves(kept, CPU)

        def step(stats, curves=curves, last=last):
            curves.step(stats)
            seen.append(stats.step)
            stats_of[stats.step] = stats
            if stats.step == last:
                raise KeyboardInterrupt

        options = Options(on_step=step, on_evaluation=curves.evaluation)
        try:
            trainer = fit(model, dataset, config, CPU, folder, options)
        except KeyboardInterrupt:
            continue
    return trainer, parts, stats_of


def test_everything_that_people_look_for_is_there(watched):
    _, (first, second), _ = watched
    assert {name for _, values in first.rows for name in values} >= ASKED_FOR
    steps = [step for part in (first, second) for step, _ in part.rows]
    assert steps == [20, 28, 40, 56, 60, 64]


def test_windows_and_rows_say_what_the_loop_did(watched):
    trainer, (first, _), stats = watched
    step, window = first.rows[0]
    assert step == CHECK_EVERY
    of = [stats[i] for i in range(1, CHECK_EVERY + 1)]
    mean = sum(s.loss * s.num_targets for s in of) / sum(s.num_targets for s in of)
    assert window["train/loss"] == pytest.approx(mean)
    assert window["train/gradient_norm"] == stats[CHECK_EVERY].grad_norm
    assert window["train/learning_rate"] == stats[CHECK_EVERY].learning_rate
    assert "train/tokens_per_second" not in window  # what came before its first step was not waited for
    row = first.rows[1][1]
    own = trainer.progress.history[0]
    assert row["valid/hr@10"] == own["hr@10"]
    assert row["train/epoch_loss"] == own["train_loss"]
    assert row["train/tokens_per_second"] == pytest.approx(own["tokens"] / own["train_seconds"])
    assert row["train/sequences_per_second"] == pytest.approx(60 * 7 / own["train_seconds"])


def test_rates_of_a_run_that_was_carried_on_begin_with_what_this_process_saw(watched):
    _, (_, second), _ = watched
    rates = {step: "train/tokens_per_second" in values for step, values in second.rows}
    assert rates == {40: False, 56: False, 60: False, 64: True}


def test_a_windows_rate_is_by_the_clock():
    kept = Kept()
    curves = Curves(kept, CPU)

    class Stats:
        skipped, num_targets, num_tokens, num_sequences = False, 1, 10, 2
        loss, grad_norm, learning_rate = 1.0, None, 0.1

        def __init__(self, step):
            self.step = step

    for step in range(1, 2 * CHECK_EVERY + 1):
        if step == CHECK_EVERY + 1:
            time.sleep(0.2)
        curves.step(Stats(step))
    values = kept.rows[-1][1]
    assert 0.2 <= CHECK_EVERY * 10 / values["train/tokens_per_second"] < 2.0
    assert values["train/tokens_per_second"] == pytest.approx(5 * values["train/sequences_per_second"])
    assert "train/gradient_norm" not in values
