"""What several processes do together in the tests, and one alone for comparison.

`torchrun --standalone --nproc-per-node 2 tests/ranks.py FOLDER` runs all cases and writes their numbers.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapting import adapted
from safetensors.torch import save_file
from small_models import histories, small_model

from reclib import hardware
from reclib.config import TrainConfig, changed
from reclib.data.dataset import Dataset, Evaluation, evaluation
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import baselines
from reclib.evaluate.baselines import CountPrior
from reclib.model import bert4rec
from reclib.model.bert4rec import Bert4Rec
from reclib.train import distributed
from reclib.train.fit import Setup, fit, fit_setup, of_options, rank_targets
from reclib.train.saving import unique_tensors
from reclib.train.trainer import Trainer

# 27 histories in steps of 8: the last step holds 3, so that of two processes the second has nothing to do.
LENGTHS = [9, 4, 12, 7, 3, 8, 5, 6, 2] * 3
STEPS = 8  # at most, in two epochs
TRAIN = TrainConfig(batch_size=8, epochs=2, lr_warmup_steps=2, learning_rate=1e-2, last_item_share=0.5)
PADDED = {"layout": "padded", "objective": "seed_focal", "loss": "plain"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of TrainConfig and of ModelConfig
    "plain": ({}, {}),
    "micro": ({"micro_batch_size": 2}, {}),
    "uneven-micro": ({"batch_size": 12, "micro_batch_size": 4}, {}),
    "clipped": ({"clip_norm": 0.05, "optimizer": "loop"}, {}),
    "unclipped": ({"clip_norm": None}, {"tied": False}),
    "untied": ({}, {"tied": False, "head": "mlp"}),
    "bf16": ({"precision": "bf16"}, {}),
    "sampled": ({"loss": "gbce", "num_negatives": 8}, {}),
    "causal": ({"objective": "next_item"}, {"causal": True}),
    "seed-focal": (PADDED, {"tied": False}),
    "sinks": ({"micro_batch_size": 2}, {}),
    "sinks-untied": ({}, {"tied": False}),
    "adapter": ({}, {}),
    "prior": ({"prior": "counts"}, {}),
    "overflow": ({"precision": "fp16"}, {}),
}
COMMAND = {"epochs": 4, "batch_size": 16, "checkpoint_seconds": 0.0, "eval_every": 2}
COMMAND |= {"lr_warmup_steps": 5, "micro_batch_size": 4}


def dataset() -> Dataset:
    """Return the histories that the runs with validation are of."""
    return synthetic_dataset(num_users=61, num_items=40, mean_len=9.0, seed=0)


def trained(case: str) -> tuple[Trainer, dict[str, Any]]:
    """Train the steps of a case; return the trainer and the numbers of each step."""
    train, shape = CASES[case]
    torch.manual_seed(0)
    model = adapted() if case == "adapter" else Bert4Rec(small_model(**shape))
    if case == "prior":
        counts = baselines.fit_pairwise_counts(histories(LENGTHS), model.config.num_items, window=3)
        model.prior = CountPrior.from_counts(counts, 0.3)
    limits = bert4rec.SMALLEST_BYTES, distributed.ALONE_BYTES
    if case.startswith("sinks"):
        bert4rec.SMALLEST_BYTES, distributed.ALONE_BYTES = 0, 0
    try:
        trainer = Trainer(model, histories(LENGTHS), changed(TRAIN, **train), hardware.resolve("cpu"), "x")
        if case == "overflow":
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
            model.final_norm.weight.register_hook(overflowing(trainer))
        stats = list(trainer.steps())
    finally:
        bert4rec.SMALLEST_BYTES, distributed.ALONE_BYTES = limits
    names = ("loss", "grad_norm", "skipped", "num_targets", "num_sequences", "row_tokens")
    seen = {name: [getattr(step, name) for step in stats] for name in names}
    return trainer, seen | {"sinks": len(trainer.sinks), "scale": trainer.scaler.get_scale()}


def overflowing(trainer: Trainer) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make one gradient infinite in step 3, in the last process alone."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        last = trainer.ranks.rank == trainer.ranks.count - 1
        return gradient * float("inf") if last and trainer.progress.step == 3 else gradient

    return hook


def validated(folder: Path | None) -> Trainer:
    """Train with validation until it stops early."""
    data = dataset()
    train = changed(TRAIN, epochs=30, eval_every=1, patience=1, learning_rate=3e-3)
    return fit(changed(small_model(), num_items=data.num_items), data, train, hardware.resolve("cpu"), folder)


def setup() -> Setup:
    """Return what the tests of the command line train."""
    return of_options("synthetic", "nano", COMMAND)


def main(folder: Path) -> None:
    with distributed.joined("cpu"):
        rank = distributed.ranks().rank
        for case in CASES:
            trainer, seen = trained(case)
            (folder / f"{case}-{rank}.json").write_text(json.dumps(seen))
            save_file(unique_tensors(trainer.model), folder / f"{case}-{rank}.safetensors")
        trainer = validated(folder / "validated")
        (folder / f"history-{rank}.json").write_text(json.dumps(trainer.progress.history))
        part = evaluation(dataset(), "valid")
        ranking = rank_targets(trainer, part, with_losses=True)
        arrays = {"ranks": torch.from_numpy(ranking.ranks), "losses": torch.from_numpy(ranking.losses)}
        save_file(arrays, folder / f"ranking-{rank}.safetensors")
        first = part.histories._replace(starts=part.histories.starts[:1], ends=part.histories.ends[:1])
        alone = rank_targets(trainer, Evaluation(first, part.targets[:1]))
        assert alone.ranks.tolist() == ranking.ranks[:1].tolist()  # the other process has no user of its own
        fit_setup(setup(), "cpu", folder / "whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
