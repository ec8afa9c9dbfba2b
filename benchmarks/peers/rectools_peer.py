"""RecTools BERT4RecModel and SASRecModel: training step, recommend(), and fit on the shared data."""

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from peer_common import (
    Data,
    lightning_clock,
    load,
    measured,
    parse_args,
    process_memory,
    report,
)
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset, Interactions
from rectools.models import BERT4RecModel, SASRecModel
from rectools.models.nn.transformers.bert4rec import BERT4RecDataPreparator
from selection import Selection, lightning_selection, outcome

LOSSES = {
    "full": ("softmax", "full softmax"),
    "sampled": ("sampled_softmax", "sampled softmax"),
}
BERT4REC_NOTES = [
    "BERT's 80/10/10 replacement of targets, not always [MASK]",
]
NOTES = [
    "logits of every position of every row, padding included; targets are selected in the loss",
    "padded to max_len on the left",
    "tied tables, no output bias, no transform before the head",
    "dropout on attention probabilities too (one rate for the whole model)",
    "dropout on the whole item table, every row of the catalogue, at every step",
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


def make_model(args, data: Data, callbacks: list[Callback]):
    """The model with a trainer whose only additions are the clock and, in a fit, the selection.

    A timed model has the whole catalogue; a real fit is left as a user would run it: items that no
    training sequence holds cannot be recommended.
    """
    steps = -1 if args.fit else args.warmup + args.steps

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[lightning_clock(Callback, count), *callbacks],
            max_epochs=(args.epochs or -1) if args.fit else -1,
            max_steps=steps,
        )

    given: dict[str, Any] = {
        "n_blocks": args.layers,
        "n_heads": args.heads,
        "n_factors": args.hidden,
        "dropout_rate": args.dropout,
        "session_max_len": args.max_len,
        "batch_size": args.batch_size,
        "recommend_batch_size": args.eval_batch_size,
        "loss": LOSSES[args.loss][0],
        "n_negatives": args.negatives,
        "lr": args.lr,
        "recommend_torch_device": "cpu",
        "get_trainer_func": trainer,
    }
    if args.model == "sasrec":
        return SASRecModel(**given)
    if not args.fit:
        given["data_preparator_type"] = WholeCatalogue
        given["data_preparator_kwargs"] = {"first_extra_user": data.num_users}
    return BERT4RecModel(mask_prob=args.mask_prob, **given)


def recommend(args, model, dataset: Dataset, num_users: int) -> np.ndarray:
    """Top items of every user by the library's own call, int32 (users, k); 0 where it has none."""
    users = np.arange(num_users)
    rows = model.recommend(users, dataset, k=args.topk, filter_viewed=True, on_unsupported_targets="ignore")
    top = np.zeros((num_users, args.topk), dtype=np.int32)
    top[rows[Columns.User].to_numpy(), rows[Columns.Rank].to_numpy() - 1] = rows[Columns.Item].to_numpy()
    return top


def fit(args, data: Data) -> tuple[Any, dict[str, Any]]:
    """Train to the end with looks at validation; then recommend once with the best weights."""
    histories = [Dataset.construct(interactions(data.sequences(with_valid))) for with_valid in (False, True)]
    callbacks: list[Callback] = []
    model = make_model(args, data, callbacks)

    def look(with_valid: bool) -> np.ndarray:
        fitted, model.is_fitted = model.is_fitted, True  # it refuses to recommend before fit() has returned
        top = recommend(args, model, histories[with_valid], data.num_users)
        model.is_fitted = fitted
        return top

    selection = Selection(args, data, look, lambda: model.torch_model.state_dict())
    callbacks.append(lightning_selection(Callback, selection))
    model._init_trainer()  # with the callback that needs the model
    model.fit(histories[False])
    took = {"epochs": model.fit_trainer.current_epoch, "steps": model.fit_trainer.global_step}
    return model, took | outcome(args, data, model.torch_model, selection)


def main() -> None:
    args = parse_args(__doc__, losses=tuple(LOSSES), models=("bert4rec", "sasrec"))
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    data = load(args.data)
    extra = [] if args.fit else extra_users(args, data)
    fields: dict[str, Any] = {"eval_users_per_second": None}
    if args.fit:
        model, found = fit(args, data)
        fields |= found
    else:
        history = interactions(data.sequences())
        if extra:
            history = pd.concat([history, interactions(extra, data.num_users)], ignore_index=True)
        dataset = Dataset.construct(history)
        model = make_model(args, data, [])
        model.fit(dataset)
    # The model trains with a copy of the trainer and of its callbacks.
    callback = next(c for c in model.fit_trainer.callbacks if hasattr(c, "clock"))
    fields |= measured(args, callback.clock) | {
        "rss_before_training_bytes": callback.rss_before,
        "peak_rss_bytes": process_memory("VmHWM"),
        "parameters": sum(p.numel() for p in model.torch_model.parameters()),
        "catalogue": len(model.data_preparator.get_known_item_ids()),
    }
    if args.eval and not args.fit:
        start = time.perf_counter()
        recommend(args, model, dataset, data.num_users)
        seconds = time.perf_counter() - start
        fields |= {
            "eval_users_per_second": data.num_users / seconds,
            "eval_seconds": seconds,
            "peak_rss_bytes_with_eval": process_memory("VmHWM"),
        }

    notes = NOTES + (BERT4REC_NOTES if args.model == "bert4rec" else [])
    if extra:
        notes.append(f"{len(extra)} users were added to declare the catalogue, then dropped")
    if args.loss == "sampled":
        notes.append(f"{args.negatives} uniform negatives for every position, padding included")
    report(
        args,
        package="rectools",
        peer="RecTools",
        loss=LOSSES[args.loss][1],
        tied=True,
        notes=notes,
        **fields,
    )


if __name__ == "__main__":
    main()
