"""RecTools BERT4RecModel: its training step, its recommend(), and its fit on the shared data."""

import time
from datetime import timedelta

import numpy as np
import pandas as pd
import torch
from peer_common import (
    Data,
    accuracy,
    lightning_clock,
    load,
    measured,
    parse_args,
    process_memory,
    report,
    write_recommendations,
)
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset, Interactions
from rectools.models import BERT4RecModel
from rectools.models.nn.transformers.bert4rec import BERT4RecDataPreparator

LOSSES = {
    "full": ("softmax", "full softmax"),
    "sampled": ("sampled_softmax", "sampled softmax"),
}
NOTES = [
    "logits of every position of every row, padding included; targets are selected in the loss",
    "padded to max_len on the left",
    "tied tables, no output bias, no transform before the head",
    "dropout on attention probabilities too (one rate for the whole model)",
    "dropout on the whole item table, every row of the catalogue, at every step",
    "BERT's 80/10/10 replacement of targets, not always [MASK]",
    "torch.optim.Adam with betas (0.9, 0.98), not fused, no weight decay",
    "evaluation: recommend() for all users, seen items filtered, from pandas to pandas",
]


class WholeCatalogue(BERT4RecDataPreparator):
    """Keeps items in the catalogue that no training sequence holds.

    RecTools takes its catalogue from the interactions. Small files of a large catalogue therefore
    carry extra users who hold the missing items; they are dropped here, once the catalogue is
    known, so that no batch ever contains them.
    """

    def __init__(self, first_extra_user: int, **kwargs):
        super().__init__(**kwargs)
        self.first_extra_user = first_extra_user

    def process_dataset_train(self, dataset: Dataset) -> None:
        super().process_dataset_train(dataset)
        full = self.train_dataset
        external = full.user_id_map.convert_to_external(full.interactions.df[Columns.User])
        kept = full.interactions.df[external < self.first_extra_user]
        kept = kept.reset_index(drop=True)
        self.train_dataset = Dataset(full.user_id_map, full.item_id_map, Interactions(kept))


def interactions(sequences: list[np.ndarray], first_user: int = 0) -> pd.DataFrame:
    """A RecTools frame; time is the position in the sequence."""
    lengths = np.array([len(sequence) for sequence in sequences])
    positions = np.concatenate([np.arange(length) for length in lengths])
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(sequences)) + first_user, lengths),
            Columns.Item: np.concatenate(sequences),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(positions, unit="s"),
        }
    )


def extra_users(args, data: Data) -> list[np.ndarray]:
    """Sequences of the items that no user has, none shorter than RecTools' minimum of two."""
    missing = np.setdiff1d(np.arange(1, data.num_items + 1), data.items)
    rows = [missing[i : i + args.max_len] for i in range(0, len(missing), args.max_len)]
    return [np.repeat(row, 2) if len(row) == 1 else row for row in rows]


def count(batch) -> tuple[int, int, int]:
    return len(batch["x"]), (batch["x"] != 0).sum(), (batch["y"] != 0).sum()


def main() -> None:
    args = parse_args(__doc__, losses=tuple(LOSSES))
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    data = load(args.data)
    train = interactions(data.sequences())
    # A real fit is left as a user would run it: items that were never seen cannot be recommended.
    extra = [] if args.fit else extra_users(args, data)
    if extra:
        train = pd.concat([train, interactions(extra, data.num_users)], ignore_index=True)
    limits = (
        {
            "max_epochs": args.epochs or -1,
            "max_time": timedelta(minutes=args.minutes) if args.minutes else None,
        }
        if args.fit
        else {"max_epochs": -1, "max_steps": args.warmup + args.steps}
    )

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[lightning_clock(Callback, count)],
            **limits,
        )

    loss, loss_name = LOSSES[args.loss]
    model = BERT4RecModel(
        n_blocks=args.layers,
        n_heads=args.heads,
        n_factors=args.hidden,
        dropout_rate=args.dropout,
        mask_prob=args.mask_prob,
        session_max_len=args.max_len,
        batch_size=args.batch_size,
        recommend_batch_size=args.eval_batch_size,
        loss=loss,
        n_negatives=args.negatives,
        lr=args.lr,
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
        data_preparator_type=WholeCatalogue,
        data_preparator_kwargs={"first_extra_user": data.num_users},
    )
    start = time.perf_counter()
    model.fit(Dataset.construct(train))
    fit_seconds = time.perf_counter() - start
    # The model trains with a copy of the trainer and of its callbacks.
    callback = next(c for c in model.fit_trainer.callbacks if hasattr(c, "clock"))
    fields = measured(args, callback.clock) | {
        "rss_before_training_bytes": callback.rss_before,
        "peak_rss_bytes": process_memory("VmHWM"),
        "parameters": sum(p.numel() for p in model.torch_model.parameters()),
        "catalogue": model.data_preparator.item_id_map.size - 2,
        "eval_users_per_second": None,
    }

    if args.eval or args.fit:
        sequences = data.sequences(with_valid=args.fit)
        history = interactions(sequences)
        if extra:
            history = pd.concat([history, interactions(extra, data.num_users)], ignore_index=True)
        dataset = Dataset.construct(history)
        users = np.arange(data.num_users)
        start = time.perf_counter()
        rows = model.recommend(
            users, dataset, k=args.topk, filter_viewed=True, on_unsupported_targets="ignore"
        )
        seconds = time.perf_counter() - start
        fields |= {
            "eval_users_per_second": len(users) / seconds,
            "eval_seconds": seconds,
            "peak_rss_bytes_with_eval": process_memory("VmHWM"),
        }
        if args.fit:
            top = np.zeros((data.num_users, args.topk), dtype=np.int32)
            top[rows[Columns.User].to_numpy(), rows[Columns.Rank].to_numpy() - 1] = rows[
                Columns.Item
            ].to_numpy()
            fields |= {
                "fit_seconds": fit_seconds,
                "epochs": model.fit_trainer.current_epoch,
                "steps": model.fit_trainer.global_step,
            } | accuracy(data, top)
            if args.out:
                write_recommendations(args.out, top)

    notes = list(NOTES)
    if extra:
        notes.append(f"{len(extra)} users were added to declare the catalogue, then dropped")
    if args.loss == "sampled":
        notes.append(f"{args.negatives} uniform negatives for every position, padding included")
    report(
        args,
        package="rectools",
        peer="RecTools",
        loss=loss_name,
        tied=True,
        notes=notes,
        **fields,
    )


if __name__ == "__main__":
    main()
