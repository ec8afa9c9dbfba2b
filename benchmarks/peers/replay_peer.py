"""RePlay Bert4Rec: its training step, its prediction with seen items removed, and its fit."""

import time
import warnings

import lightning
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
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import (
    PandasSequentialDataset,
    TensorFeatureInfo,
    TensorFeatureSource,
    TensorSchema,
)
from replay.models.nn.sequential import Bert4Rec
from replay.models.nn.sequential.bert4rec import (
    Bert4RecPredictionDataset,
    Bert4RecTrainingDataset,
)
from replay.models.nn.sequential.callbacks import PandasPredictionCallback
from replay.models.nn.sequential.postprocessors import RemoveSeenItems
from selection import Selection, lightning_selection, outcome
from torch.utils.data import DataLoader

LOSSES = {
    "full": ("CE", "full softmax"),
    "restricted": ("CE_restricted", "full softmax, targets gathered before the head"),
    "sampled": ("CE", "sampled softmax"),
}
NOTES = [
    "padded to max_len on the left",
    "untied tables with an output bias (its default), no transform before the head",
    "dropout on attention probabilities too (one rate for the whole model)",
    "a full row always has a target; a padded one may have none",
    "torch.optim.Adam with betas (0.9, 0.98), not fused, no weight decay",
    "evaluation: Trainer.predict with RemoveSeenItems and top-k, to pandas",
    "the library marks this Bert4Rec API as deprecated; 0.22.0 has no other Bert4Rec",
]
LOSS_NOTES = {
    "full": "default loss: logits of every position of every row, masked positions picked after",
    "restricted": "CE_restricted: same loss value as CE, head only at masked positions",
    "sampled": "uniform negatives per target; the head runs over the batch's distinct negatives",
}


def dataset(sequences: list[np.ndarray], num_items: int, hidden: int) -> PandasSequentialDataset:
    """RePlay's sequential dataset; its item ids are 0..num_items-1."""
    schema = TensorSchema(
        TensorFeatureInfo(
            name="item_id",
            feature_type=FeatureType.CATEGORICAL,
            is_seq=True,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            cardinality=num_items,
            embedding_dim=hidden,
        )
    )
    frame = pd.DataFrame(
        {
            "user_id": np.arange(len(sequences)),
            "item_id": [sequence - 1 for sequence in sequences],
        }
    )
    return PandasSequentialDataset(schema, "user_id", "item_id", frame)


def count(batch) -> tuple[int, int, int]:
    real = batch["pad_mask"]
    return len(real), real.sum(), (real & ~batch["token_mask"]).sum()


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def make_model(args, schema: TensorSchema) -> Bert4Rec:
    return Bert4Rec(
        schema,
        block_count=args.layers,
        head_count=args.heads,
        hidden_size=args.hidden,
        max_seq_len=args.max_len,
        dropout_rate=args.dropout,
        loss_type=LOSSES[args.loss][0],
        loss_sample_count=args.negatives if args.loss == "sampled" else None,
        **optimizer(args.lr),
    )


def recommend(args, model: Bert4Rec, history: PandasSequentialDataset, num_users: int) -> np.ndarray:
    """Top items of every user by the library's own call, int32 (users, k)."""
    predictions = PandasPredictionCallback(
        top_k=args.topk,
        query_column="user_id",
        item_column="item_id",
        rating_column="score",
        postprocessors=[RemoveSeenItems(history)],
    )
    lightning.Trainer(callbacks=[predictions], **QUIET).predict(
        model,
        DataLoader(
            Bert4RecPredictionDataset(history, max_sequence_length=args.max_len),
            batch_size=args.eval_batch_size,
        ),
        # Or Lightning would keep the scores of every user over the whole catalogue.
        return_predictions=False,
    )
    rows = predictions.get_result()
    users = rows["user_id"].to_numpy(dtype=np.int64).reshape(-1, args.topk)[:, 0]
    top = np.zeros((num_users, args.topk), dtype=np.int32)
    top[users] = rows["item_id"].to_numpy(dtype=np.int64).reshape(-1, args.topk) + 1
    return top


def select(args, data: Data, model: Bert4Rec) -> Selection:
    """Looks at validation with a twin of the model, whose own trainer is busy training."""
    histories = [
        dataset(data.sequences(with_valid), data.num_items, args.hidden) for with_valid in (False, True)
    ]
    twin = make_model(args, histories[0].schema)

    def look(with_valid: bool) -> np.ndarray:
        twin.load_state_dict(model.state_dict())
        return recommend(args, twin, histories[with_valid], data.num_users)

    return Selection(args, data, look, model.state_dict)


def main() -> None:
    args = parse_args(__doc__, losses=tuple(LOSSES))
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    lightning.seed_everything(args.seed)
    data = load(args.data)
    train = dataset(data.sequences(), data.num_items, args.hidden)
    model = make_model(args, train.schema)
    loader = DataLoader(
        Bert4RecTrainingDataset(train, max_sequence_length=args.max_len, mask_prob=args.mask_prob),
        batch_size=args.batch_size,
        shuffle=True,
    )
    callback = lightning_clock(lightning.Callback, count)
    if args.fit:
        selection = select(args, data, model)
        callbacks = [callback, lightning_selection(lightning.Callback, selection)]
        trainer = lightning.Trainer(callbacks=callbacks, max_epochs=args.epochs or -1, **QUIET)
    else:
        steps = args.warmup + args.steps
        trainer = lightning.Trainer(callbacks=[callback], max_epochs=-1, max_steps=steps, **QUIET)
    trainer.fit(model, loader)
    fields = measured(args, callback.clock) | {
        "rss_before_training_bytes": callback.rss_before,
        "peak_rss_bytes": process_memory("VmHWM"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "catalogue": data.num_items,
        "eval_users_per_second": None,
    }
    if args.fit:
        fields |= {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        fields |= outcome(args, data, model, selection)
    elif args.eval:
        start = time.perf_counter()
        recommend(args, model, train, data.num_users)
        seconds = time.perf_counter() - start
        fields |= {
            "eval_users_per_second": data.num_users / seconds,
            "eval_seconds": seconds,
            "peak_rss_bytes_with_eval": process_memory("VmHWM"),
        }
    report(
        args,
        package="replay-rec",
        peer="RePlay",
        loss=LOSSES[args.loss][1],
        tied=False,
        notes=[*NOTES, LOSS_NOTES[args.loss]],
        **fields,
    )


def optimizer(lr: float) -> dict:
    """The learning rate, only where it is not the library's own default of 1e-3."""
    if lr == 1e-3:
        return {}
    from replay.models.nn.optimizer_utils import FatOptimizerFactory

    return {"optimizer_factory": FatOptimizerFactory(learning_rate=lr)}


if __name__ == "__main__":
    main()
