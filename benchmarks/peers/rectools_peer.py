"""RecTools: BERT4RecModel, SASRecModel, and the network of `fast_transformers` (0.19), on the shared data."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from harness import EVAL_BATCH_SIZE, TOP_K, Data, lightning_callback, run, trainer_options
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.fast_transformers import FlatSASRecNet, SequenceBatchDataset, build_sequences
from rectools.models import BERT4RecModel, SASRecModel
from torch.utils.data import DataLoader


def interactions(sequences: list[np.ndarray]) -> Dataset:
    """RecTools' data; time is the position in the sequence."""
    lengths = np.array([len(sequence) for sequence in sequences])
    positions = np.concatenate([np.arange(length) for length in lengths])
    columns = {
        Columns.User: np.repeat(np.arange(len(sequences)), lengths),
        Columns.Item: np.concatenate(sequences),
        Columns.Weight: 1.0,
        Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(positions, unit="s"),
    }
    return Dataset.construct(pd.DataFrame(columns))


class RecTools:
    """The library's model under its own trainer, whose only addition is the callback that watches.

    Its catalogue is what the interactions hold: items that no training sequence has cannot be recommended.
    """

    package, losses = "rectools", ("full", "sampled")

    def __init__(self, args, data: Data) -> None:
        self.args, self.data = args, data
        seed_everything(args.seed)
        self.histories = [interactions(data.sequences(with_valid)) for with_valid in (False, True)]
        options: dict[str, Any] = {
            "n_blocks": args.layers,
            "n_heads": args.heads,
            "n_factors": args.hidden,
            "dropout_rate": args.dropout,
            "session_max_len": args.max_len,
            "batch_size": args.batch_size,
            "recommend_batch_size": EVAL_BATCH_SIZE,
            "loss": "softmax" if args.loss == "full" else "sampled_softmax",
            "n_negatives": args.negatives,
            "lr": 1e-3,
            "recommend_torch_device": "cpu",
            "get_trainer_func": self.trainer,
        }
        self.callback = Callback()  # one that does nothing, until there is a model to watch
        bert4rec = args.model == "bert4rec"
        masked = {"mask_prob": args.mask_prob}
        self.model = BERT4RecModel(**masked, **options) if bert4rec else SASRecModel(**options)

    def trainer(self) -> Trainer:
        return Trainer(**trainer_options(self.args, self.callback))

    @property
    def module(self):
        return self.model.torch_model

    @staticmethod
    def count(batch) -> int:
        return len(batch["x"])

    def train(self, watch) -> None:
        self.callback = lightning_callback(Callback, watch)
        self.model._init_trainer()  # with the callback that needs the model
        self.model.fit(self.histories[0])

    def recommend(self, with_valid: bool) -> np.ndarray:
        """Top items of every user by the library's own call, int32 (users, k); 0 where it has none."""
        users, history = np.arange(self.data.num_users), self.histories[with_valid]
        fitted, self.model.is_fitted = self.model.is_fitted, True  # it refuses before fit() has returned
        options = {"filter_viewed": True, "on_unsupported_targets": "ignore"}
        rows = self.model.recommend(users, history, k=TOP_K, **options)
        self.model.is_fitted = fitted
        top = np.zeros((len(users), TOP_K), dtype=np.int32)
        top[rows[Columns.User].to_numpy(), rows[Columns.Rank].to_numpy() - 1] = rows[Columns.Item].to_numpy()
        return top

    def fields(self) -> dict[str, Any]:
        known = self.model.data_preparator.get_known_item_ids()
        return {"peer": "RecTools", "tied": True, "catalogue": len(known)}


class FlatSASRec(LightningModule):
    """The library's flat network with the full softmax; it brings a trainer of text embeddings alone."""

    def __init__(self, net: FlatSASRecNet) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, index: int) -> torch.Tensor:
        logits = self.net(batch)  # (B, L, items), of items 1..N
        targets = batch["y"].flatten() - 1  # -1: padding
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class FastSASRec:
    """The fast path: sequences are built as tensors once, and a flat causal network trains on them."""

    package, losses, count = "rectools", ("full",), RecTools.count

    def __init__(self, args, data: Data) -> None:
        self.args, self.data = args, data
        seed_everything(args.seed)
        users = torch.from_numpy(np.repeat(np.arange(data.num_users), np.diff(data.offsets)))
        items = torch.from_numpy(data.items.astype(np.int64))
        order = torch.arange(len(items))  # in the place of times
        self.x, self.y, self.items, _ = build_sequences(users, items, order, args.max_len)
        shape = (len(self.items), args.hidden, args.layers, args.heads, args.max_len)
        self.module = FlatSASRec(FlatSASRecNet(*shape, dropout=args.dropout))

    def train(self, watch) -> None:
        rows = SequenceBatchDataset(self.x, self.y)
        trainer = Trainer(**trainer_options(self.args, lightning_callback(Callback, watch)))
        trainer.fit(self.module, DataLoader(rows, batch_size=self.args.batch_size, shuffle=True))

    @torch.no_grad()
    def recommend(self, with_valid: bool) -> np.ndarray:
        """Top items of every user, int32 (users, k): scores by the network, seen items removed here."""
        net, length = self.module.net.eval(), self.args.max_len
        number = np.zeros(self.data.num_items + 1, dtype=np.int64)  # 0: an item that no sequence has
        number[self.items.numpy()] = np.arange(1, len(self.items) + 1)
        histories = [number[row][number[row] > 0] for row in self.data.sequences(with_valid)]
        blocks = []
        for first in range(0, len(histories), EVAL_BATCH_SIZE):
            block = histories[first : first + EVAL_BATCH_SIZE]
            x = torch.zeros(len(block), length, dtype=torch.long)
            for place, row in enumerate(block):
                x[place, length - len(row[-length:]) :] = torch.from_numpy(row[-length:])
            scores = net.encode_last(x) @ net.all_item_embeddings().T
            for place, row in enumerate(block):
                scores[place, row - 1] = -torch.inf
            blocks.append(self.items[scores.topk(TOP_K).indices].numpy())
        return np.concatenate(blocks).astype(np.int32)

    def fields(self) -> dict[str, Any]:
        return {"peer": "RecTools fast_transformers", "tied": True, "catalogue": len(self.items)}


if __name__ == "__main__":
    run({"bert4rec": RecTools, "sasrec": RecTools, "fast-sasrec": FastSASRec}, __doc__)
