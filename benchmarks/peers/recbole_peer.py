"""RecBole BERT4Rec: its trainer's step, its full-ranking evaluation, and its fit."""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peer_common import (
    Data,
    StepClock,
    load,
    measured,
    parse_args,
    process_memory,
    report,
)
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from selection import Selection, outcome

NOTES = [
    "int(mask_prob * max_len) target slots per row, empty ones run through the head too",
    "a target at the first position of a row is left out of the loss (mask index 0 means empty)",
    "padded on the right, to the longest row of the data (see padded_length)",
    "one row per user (its benchmark files), as the other sides, not one per prefix",
    "tied tables with an output bias; a linear layer, GELU and LayerNorm before the head",
    "a negative item is drawn for every target and then not used by this loss",
    "torch.optim.Adam, not fused, no weight decay; loss.item() and a NaN check at every step",
    "evaluation: Trainer.evaluate, ranks and metrics at 10; for sequential models it does NOT "
    "remove seen items",
    "at prediction time the oldest item of every history is cut off, short ones included",
]
FIT_NOTES = [
    "ft_ratio 0.5, its default: half of the batches mask the last item alone",
    "dropout of 0.2 on attention probabilities, its default",
]
TIMING_NOTES = ["no dropout on attention probabilities (settable here; its default is 0.2)"]


def write_files(folder: Path, args, data: Data) -> None:
    """RecBole's files: the training rows, and the rows to rank for, one per user.

    The item file declares the catalogue, so that items no sequence holds have a row in the table.
    """
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    train = data.sequences()
    # Nothing is timed on the validation rows, and one is enough where nothing is selected by them.
    valid, history = (train, data.sequences(with_valid=True)) if args.fit else (train[:1], train)
    target = np.ones(data.num_users, dtype=int) if data.test is None else data.test
    folder.mkdir()
    for name, sequences in (("train", train), ("valid", valid), ("test", history)):
        with open(folder / f"peer.{name}.inter", "w", encoding="ascii") as file:
            file.write(header)
            for user, sequence in enumerate(sequences):
                tokens = " ".join(map(str, sequence[-args.max_len :]))
                file.write(f"{user}\t{tokens}\t{max(target[user], 1)}\n")
    with open(folder / "peer.item", "w", encoding="ascii") as file:
        file.write("item_id:token\n")
        file.writelines(f"{item}\n" for item in range(1, data.num_items + 1))


class TimedLoader:
    """Hands RecBole's own batches to RecBole's own loop, and clocks the loop's steps.

    Asking for the next batch is the moment at which the step before it is done.
    """

    def __init__(self, loader, clock: StepClock, steps: int | None, model):
        self.loader = loader
        self.clock = clock
        self.steps = steps
        self.model = model
        self.selection: Selection | None = None  # of a fit
        self.last_loss = torch.tensor(float("nan"))

    def finished(self) -> bool:
        out_of_steps = self.steps is not None and len(self.clock.seconds) >= self.steps
        return out_of_steps or (self.selection is not None and self.selection.stop)

    def __iter__(self) -> Iterator:
        self.clock.open()
        for batch in self.loader:
            self.clock.fetched()
            yield batch
            self.clock.close(batch, self.last_loss)
            if self.selection is not None and self.selection.step_done():
                self.model.train()
            if self.finished():
                return


def count(batch) -> tuple[int, int, int]:
    return len(batch), (batch["Mask_item_id_list"] != 0).sum(), (batch["MASK_INDEX"] > 0).sum()


def main() -> None:
    args = parse_args(__doc__, losses=("full",))
    # It warns, at every table it reads, of what later versions of pandas will change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # RecBole reads the command line too, and knows none of these options.
    sys.argv = sys.argv[:1]
    torch.set_num_threads(args.threads)
    data = load(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        # Its logs and checkpoints go to folders below the working directory.
        os.chdir(scratch)
        fields = run(args, data, Path(scratch))
        os.chdir("/")
    report(args, package="recbole", peer="RecBole", tied=True, **fields)


def settings(args, scratch: Path) -> dict:
    return {
        "data_path": str(scratch),
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": args.max_len,
        "n_layers": args.layers,
        "n_heads": args.heads,
        "hidden_size": args.hidden,
        "inner_size": 4 * args.hidden,
        "hidden_dropout_prob": args.dropout,
        "attn_dropout_prob": 0.2 if args.fit else 0.0,
        "mask_ratio": args.mask_prob,
        # Its default makes half of the batches mask the last item alone: one target a row.
        # The timing keeps to the objective of the other sides, a fit to the default.
        "ft_ratio": 0.5 if args.fit else 0.0,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": args.batch_size,
        "eval_batch_size": args.eval_batch_size,
        "eval_args": {
            "split": {"LS": "valid_and_test"},
            "order": "TO",
            "mode": "full",
            "group_by": "user",
        },
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


def train(args, data: Data, loader: TimedLoader, trainer, look) -> tuple[int, Selection | None]:
    """Train through RecBole's own loop; return the epochs begun and, of a fit, its selection.

    The timing keeps to its steps; a fit ends where its selection says.
    """
    selection = None
    if args.fit:
        selection = loader.selection = Selection(args, data, look, loader.model.state_dict)
        selection.start(len(loader.loader))

    def loss_func(batch):
        loss = loader.model.calculate_loss(batch)
        loader.last_loss = loss.detach()
        return loss

    epochs = 0
    while not loader.finished() and (not args.fit or args.epochs is None or epochs < args.epochs):
        trainer._train_epoch(loader, epochs, loss_func=loss_func)
        epochs += 1
        if selection is not None:
            selection.epoch_done(epochs)
    if selection is not None:
        selection.finish()
    return epochs, selection


def run(args, data: Data, scratch: Path) -> dict:
    write_files(scratch / "peer", args, data)
    config = Config(model="BERT4Rec", dataset="peer", config_dict=settings(args, scratch))
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train_data.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)

    rss_before = process_memory("VmRSS")
    steps = None if args.fit else args.warmup + args.steps
    loader = TimedLoader(train_data, StepClock(count), steps, model)

    def look(with_valid: bool) -> np.ndarray:
        return recommend(args, data, dataset, model, with_valid, test_data if with_valid else valid_data)

    epochs, selection = train(args, data, loader, trainer, look)
    notes = NOTES + (FIT_NOTES if args.fit else TIMING_NOTES)
    fields = measured(args, loader.clock) | {
        "loss": "full softmax",
        "rss_before_training_bytes": rss_before,
        "peak_rss_bytes": process_memory("VmHWM"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "catalogue": dataset.item_num - 1,
        "padded_length": train_data.dataset.inter_feat["item_id_list"].shape[1],
        "target_slots_per_sequence": model.mask_item_length,
        "eval_users_per_second": None,
        "notes": notes,
    }

    if selection is not None:
        fields |= {"epochs": epochs, "steps": len(loader.clock.seconds)}
        fields |= outcome(args, data, model, selection)
    elif args.eval:
        start = time.perf_counter()
        trainer.evaluate(test_data, load_best_model=False)
        seconds = time.perf_counter() - start
        fields |= {
            "eval_users_per_second": data.num_users / seconds,
            "eval_seconds": seconds,
            "peak_rss_bytes_with_eval": process_memory("VmHWM"),
        }
    return fields


@torch.no_grad()
def recommend(args, data: Data, dataset, model, with_valid: bool, rows) -> np.ndarray:
    """The model's scores with seen items removed, which RecBole does not do by itself here."""
    model.eval()
    # RecBole numbers items in the order in which it reads them.
    outside = dataset.id2token(dataset.iid_field, np.arange(1, dataset.item_num)).astype(np.int64)
    inside = np.zeros(data.num_items + 1, dtype=np.int64)
    inside[outside] = np.arange(1, dataset.item_num)
    outside = np.insert(outside, 0, 0)
    history = data.sequences(with_valid)
    top = np.zeros((data.num_users, args.topk), dtype=np.int32)
    row = 0
    for interaction, *_ in rows:
        scores = model.full_sort_predict(interaction).view(len(interaction), -1)
        scores[:, 0] = -np.inf
        for i in range(len(interaction)):
            scores[i, inside[history[row + i]]] = -np.inf
        best = torch.topk(scores, args.topk).indices.numpy()
        top[row : row + len(interaction)] = outside[best]
        row += len(interaction)
    return top


if __name__ == "__main__":
    main()
