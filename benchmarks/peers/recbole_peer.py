"""RecBole BERT4Rec: its trainer's step and its full-ranking evaluation; no fit."""

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
    sequences = data.sequences()
    target = np.ones(data.num_users, dtype=int) if data.test is None else np.maximum(data.test, 1)
    folder.mkdir()
    rows = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
    for user, sequence in enumerate(sequences):
        rows.append(f"{user}\t{' '.join(map(str, sequence[-args.max_len :]))}\t{target[user]}")
    for name, part in (("train", rows), ("valid", rows[:2]), ("test", rows)):  # nothing is timed on valid
        (folder / f"peer.{name}.inter").write_text("\n".join(part) + "\n")
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
        "attn_dropout_prob": 0.0,  # its default of 0.2 would be more work than the other sides have
        "ft_ratio": 0.0,  # by default half of the batches mask the last item alone
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
            yield batch
            self.watch.step_done(batch, self.last_loss)
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
        if args.fit:
            raise SystemExit("RecBole is timed only: --fit is not offered")
        self.data = data
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
        while not watch.stop:
            self.trainer._train_epoch(loader, 0, loss_func=loader.loss)

    def evaluate(self) -> None:
        self.trainer.evaluate(self.rows[2], load_best_model=False)

    def fields(self) -> dict[str, Any]:
        padded = self.rows[0].dataset.inter_feat["item_id_list"].shape[1]
        os.chdir("/")
        self.scratch.cleanup()
        found = {"peer": "RecBole", "tied": True, "catalogue": self.dataset.item_num - 1}
        return found | {"padded_length": padded, "target_slots_per_sequence": self.module.mask_item_length}


if __name__ == "__main__":
    run(RecBole, __doc__)
