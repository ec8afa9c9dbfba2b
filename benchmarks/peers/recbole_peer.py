"""RecBole BERT4Rec: its trainer's step, its full-ranking evaluation, and its fit."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Data, run
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def write_files(folder: Path, args, data: Data) -> None:
    """RecBole's files: the training rows, and the rows to rank for, one per user.

    The item file declares the catalogue, so that items no sequence holds have a row in the table.
    """
    train = data.sequences()
    # Nothing is timed on the validation rows, and one is enough where nothing is selected by them.
    parts = {"train": train, "valid": train if args.fit else train[:1], "test": data.sequences(args.fit)}
    target = np.ones(data.num_users, dtype=int) if data.test is None else np.maximum(data.test, 1)
    folder.mkdir()
    for name, sequences in parts.items():
        rows = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        for user, sequence in enumerate(sequences):
            rows.append(f"{user}\t{' '.join(map(str, sequence[-args.max_len :]))}\t{target[user]}")
        (folder / f"peer.{name}.inter").write_text("\n".join(rows) + "\n")
    items = "".join(f"{item}\n" for item in range(1, data.num_items + 1))
    (folder / "peer.item").write_text("item_id:token\n" + items)


def settings(args, folder: str) -> dict:
    return {
        "data_path": folder,
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": args.max_len,
        "n_layers": args.layers,
        "n_heads": args.heads,
        "hidden_size": args.hidden,
        "inner_size": 4 * args.hidden,
        "hidden_dropout_prob": args.dropout,
        # Of these two the timing keeps to the objective of the other sides, a fit to the defaults: dropout on
        # attention, and half of the batches with the last item alone masked.
        "attn_dropout_prob": 0.2 if args.fit else 0.0,
        "ft_ratio": 0.5 if args.fit else 0.0,
        "mask_ratio": args.mask_prob,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": args.batch_size,
        "eval_batch_size": args.eval_batch_size,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["Hit", "NDCG"],
        "topk": [args.topk],
        "valid_metric": f"NDCG@{args.topk}",
        "learning_rate": args.lr,
        "seed": args.seed,
        "use_gpu": False,
        "worker": 0,
        "show_progress": False,
        "state": "ERROR",
    }


class TimedLoader:
    """Hands RecBole's own batches to RecBole's own loop, which is watched.

    Asking for the next batch is the moment at which the step before it is done.
    """

    def __init__(self, loader, watch, model) -> None:
        self.loader, self.watch, self.model = loader, watch, model
        self.last_loss = torch.tensor(float("nan"))

    def __iter__(self):
        for batch in self.loader:
            self.watch.fetched()
            yield batch
            if self.watch.step_done(batch, self.last_loss):
                self.model.train()
            if self.watch.stop:
                return

    def loss(self, batch):
        loss = self.model.calculate_loss(batch)
        self.last_loss = loss.detach()
        return loss


class RecBole:
    """The library's model under its own trainer's loop over epochs."""

    package, models = "recbole", ("bert4rec",)
    losses = ("full",)

    def __init__(self, args, data: Data) -> None:
        self.args, self.data = args, data
        # It warns, at every table it reads, of what later versions of pandas will change.
        warnings.filterwarnings("ignore", category=FutureWarning)
        sys.argv = sys.argv[:1]  # RecBole reads the command line too, and knows none of these options
        self.scratch = tempfile.TemporaryDirectory()
        os.chdir(self.scratch.name)  # its logs and checkpoints go to folders below the working directory
        write_files(Path("peer"), args, data)
        given = settings(args, self.scratch.name)
        config = Config(model="BERT4Rec", dataset="peer", config_dict=given)
        init_seed(config["seed"], config["reproducibility"])
        self.dataset = create_dataset(config)
        self.rows = data_preparation(config, self.dataset)  # train, valid, test
        self.module = get_model(config["model"])(config, self.rows[0].dataset).to(config["device"])
        self.trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, self.module)

    @staticmethod
    def count(batch) -> tuple[int, int, int]:
        return len(batch), (batch["Mask_item_id_list"] != 0).sum(), (batch["MASK_INDEX"] > 0).sum()

    def train(self, watch) -> None:
        loader = TimedLoader(self.rows[0], watch, self.module)
        watch.start(len(self.rows[0]))
        epochs = 0
        while not watch.stop and (not self.args.fit or epochs != self.args.epochs):
            self.trainer._train_epoch(loader, epochs, loss_func=loader.loss)
            epochs += 1
            watch.epoch_done(epochs)
        watch.finish()

    def evaluate(self) -> None:
        self.trainer.evaluate(self.rows[2], load_best_model=False)

    @torch.no_grad()
    def recommend(self, with_valid: bool) -> np.ndarray:
        """The model's scores with seen items removed, which RecBole does not do by itself here."""
        self.module.eval()
        # RecBole numbers items in the order in which it reads them.
        count = self.dataset.item_num
        names = self.dataset.id2token(self.dataset.iid_field, np.arange(1, count)).astype(np.int64)
        inside = np.zeros(self.data.num_items + 1, dtype=np.int64)
        inside[names] = np.arange(1, count)
        outside, history = np.insert(names, 0, 0), self.data.sequences(with_valid)
        top = np.zeros((self.data.num_users, self.args.topk), dtype=np.int32)
        row = 0
        for batch, *_ in self.rows[2 if with_valid else 1]:
            scores = self.module.full_sort_predict(batch).view(len(batch), -1)
            scores[:, 0] = -np.inf
            for i in range(len(batch)):
                scores[i, inside[history[row + i]]] = -np.inf
            best = torch.topk(scores, self.args.topk).indices.numpy()
            top[row : row + len(batch)] = outside[best]
            row += len(batch)
        return top

    def fields(self) -> dict[str, Any]:
        padded = self.rows[0].dataset.inter_feat["item_id_list"].shape[1]
        os.chdir("/")
        self.scratch.cleanup()
        found = {"peer": "RecBole", "tied": True, "catalogue": self.dataset.item_num - 1}
        return found | {"padded_length": padded, "target_slots_per_sequence": self.module.mask_item_length}


if __name__ == "__main__":
    run(RecBole, __doc__)
