"""RePlay Bert4Rec: its training step, its prediction with seen items removed, and its fit."""

import warnings
from typing import Any

import lightning
import numpy as np
import pandas as pd
from harness import EVAL_BATCH_SIZE, LIGHTNING, TOP_K, Data, lightning_callback, run, trainer_options
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.models.nn.sequential import Bert4Rec
from replay.models.nn.sequential.bert4rec import Bert4RecPredictionDataset, Bert4RecTrainingDataset
from replay.models.nn.sequential.callbacks import PandasPredictionCallback
from replay.models.nn.sequential.postprocessors import RemoveSeenItems
from torch.utils.data import DataLoader


class RePlay:
    """The library's model under a Lightning trainer; its item ids are 0..num_items-1."""

    package, losses = "replay-rec", ("full", "restricted", "sampled")

    def __init__(self, args, data: Data) -> None:
        self.args, self.data = args, data
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        lightning.seed_everything(args.seed)
        source = TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")
        feature = TensorFeatureInfo(
            name="item_id",
            feature_type=FeatureType.CATEGORICAL,
            is_seq=True,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[source],
            cardinality=data.num_items,
            embedding_dim=args.hidden,
        )
        self.schema = TensorSchema(feature)
        self.histories = [self.dataset(data.sequences(with_valid)) for with_valid in (False, True)]
        self.module = self.model()
        self.twin = self.model() if args.fit else None  # recommends while the model's own trainer is busy

    def dataset(self, sequences: list[np.ndarray]) -> PandasSequentialDataset:
        columns = {"user_id": np.arange(len(sequences)), "item_id": [row - 1 for row in sequences]}
        return PandasSequentialDataset(self.schema, "user_id", "item_id", pd.DataFrame(columns))

    def model(self) -> Bert4Rec:
        args = self.args
        return Bert4Rec(
            self.schema,
            block_count=args.layers,
            head_count=args.heads,
            hidden_size=args.hidden,
            max_seq_len=args.max_len,
            dropout_rate=args.dropout,
            loss_type="CE_restricted" if args.loss == "restricted" else "CE",
            loss_sample_count=args.negatives if args.loss == "sampled" else None,
        )

    @staticmethod
    def count(batch) -> int:
        return len(batch["pad_mask"])

    def train(self, watch) -> None:
        args = self.args
        limits = {"max_sequence_length": args.max_len, "mask_prob": args.mask_prob}
        rows = Bert4RecTrainingDataset(self.histories[0], **limits)
        trainer = lightning.Trainer(**trainer_options(args, lightning_callback(lightning.Callback, watch)))
        trainer.fit(self.module, DataLoader(rows, batch_size=args.batch_size, shuffle=True))

    def recommend(self, with_valid: bool) -> np.ndarray:
        """Top items of every user by the library's own call, int32 (users, k)."""
        history, model = self.histories[with_valid], self.module
        if self.twin is not None:
            self.twin.load_state_dict(self.module.state_dict())
            model = self.twin
        predictions = PandasPredictionCallback(
            top_k=TOP_K,
            query_column="user_id",
            item_column="item_id",
            rating_column="score",
            postprocessors=[RemoveSeenItems(history)],
        )
        rows = Bert4RecPredictionDataset(history, max_sequence_length=self.args.max_len)
        # Or Lightning would keep the scores of every user over the whole catalogue.
        lightning.Trainer(callbacks=[predictions], **LIGHTNING).predict(
            model, DataLoader(rows, batch_size=EVAL_BATCH_SIZE), return_predictions=False
        )
        table = predictions.get_result()
        top = np.zeros((self.data.num_users, TOP_K), dtype=np.int32)
        users = table["user_id"].to_numpy(dtype=np.int64).reshape(-1, TOP_K)[:, 0]
        top[users] = table["item_id"].to_numpy(dtype=np.int64).reshape(-1, TOP_K) + 1
        return top

    def fields(self) -> dict[str, Any]:
        return {"peer": "RePlay", "tied": False, "catalogue": self.data.num_items}


if __name__ == "__main__":
    run({"bert4rec": RePlay}, __doc__)
