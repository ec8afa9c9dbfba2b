"""A prior of pairwise counts: their log is added to a model's logits with a learned scale.

    logit(j | h) = network(j | h) + scale * log(1 + score(j | h) / floor)

`score` is that of `baselines.PairwiseCounts`. It is 0 for most items, so that the prior is sparse. Network
and scale are trained together. With scale 0 the model equals the network.

In training the counts would contain the answer, since a user's history was counted as well. The contribution
of the history itself is therefore subtracted from its scores.

Shapes: T items of all sequences, M queries, I real items, N scored (query, item) pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scipy import sparse
from reclib.data.batches import Samples, whole_sequences
from reclib.data.dataset import Histories
from reclib.data.splits import Split
from reclib.evaluate import baselines
from reclib.evaluate.baselines import PairwiseCounts

FLOOR_USERS = 500  # validation histories whose scores determine `floor`

SMALLEST = 1e-4  # smaller values are rounding errors of a subtracted count

NAMES = ("indptr", "indices", "data", "row_scale", "column_scale", "settings")


class Entries(NamedTuple):
    """A sparse matrix (M, I), ordered by row."""

    rows: np.ndarray  # int64 (N,)
    columns: np.ndarray  # int64 (N,): item id - 1
    values: np.ndarray  # float32 (N,)


class CountPrior(nn.Module):
    """Pairwise counts as a part of a model."""

    settings: Tensor  # backward, decay, last, window, floor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Use the tensors of `from_counts`, or those of a checkpoint under the same names."""
        super().__init__()
        self.scale = nn.Parameter(tensors["scale"].detach().clone())  # ()
        for name in NAMES:
            self.register_buffer(name, tensors[name])
        self._numpy: tuple[sparse.csr_array, np.ndarray, np.ndarray] | None = None

    @classmethod
    def from_counts(cls, counts: PairwiseCounts, floor: float) -> CountPrior:
        """Return a prior of fitted counts; `floor` is the score at which it is log 2."""
        pairs = (counts.forward + np.float32(counts.backward) * counts.forward.T.tocsr()).tocsr()
        rows, columns = counts.scales(pairs)
        settings = [counts.backward, counts.decay, counts.last, counts.window, floor]
        arrays = {
            "indptr": pairs.indptr.astype(np.int64),
            "indices": pairs.indices.astype(np.int32),
            "data": pairs.data.astype(np.float32),
            "row_scale": rows.astype(np.float32),
            "column_scale": columns.astype(np.float32),
            "settings": np.array(settings, dtype=np.float64),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        return cls(tensors | {"scale": torch.ones(())})

    @classmethod
    def chosen(cls, split: Split, num_items: int) -> CountPrior:
        """Count the training histories, with the settings and the floor that validation chooses."""
        family = baselines.families()["pairwise_counts"]
        counts: PairwiseCounts = baselines.choose(family, split.train, num_items, split.valid).recommender  # type: ignore[assignment]
        drawn = np.random.default_rng(0).permutation(len(split.valid.targets))[:FLOOR_USERS]
        positive = [scores[scores > 0] for _, scores in counts.scores(split.valid.rows(drawn))]
        values = torch.cat(positive).numpy() if positive else np.ones(1)
        return cls.from_counts(counts, float(np.median(values)) if len(values) else 1.0)

    def counted_anew(self, counts: PairwiseCounts) -> CountPrior:
        """Return a prior of other (newer) counts with this one's scale and floor, without training."""
        prior = CountPrior.from_counts(counts, float(self.settings[-1]))
        prior.scale.data.copy_(self.scale.data)
        return prior

    def _apply(self, fn: Any, recurse: bool = True) -> CountPrior:
        self._numpy = None
        return super()._apply(fn, recurse)

    def arrays(self) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
        """Return the scaled counts (I, I), and the scales of rows (I,) and columns (I,)."""
        if self._numpy is None:
            from scipy import sparse

            indptr, indices, data, rows, columns = (getattr(self, name).cpu().numpy() for name in NAMES[:5])
            scaled = data * np.repeat(rows, np.diff(indptr)) * columns[indices]
            matrix = sparse.csr_array((scaled, indices, indptr), shape=(len(rows), len(rows)))
            self._numpy = matrix, rows, columns
        return self._numpy

    def entries(
        self, tokens: np.ndarray, lengths: np.ndarray, sequence: np.ndarray, known: np.ndarray
    ) -> Entries:
        """Return the prior of queries, before its scale.

        `tokens` (T,) are the concatenated sequences of `lengths` (B,). Query m predicts the item after the
        first `known[m]` items of sequence `sequence[m]`.
        """
        from scipy import sparse

        weights, row_scale, _ = self.arrays()
        _, decay, last, _, floor = self.settings.tolist()
        items, num_items = tokens.astype(np.int64) - 1, len(row_scale)
        starts = np.cumsum(lengths) - lengths
        age = np.arange(int(last))
        query, age = np.nonzero(age < known[:, None])  # every item that counts, newest first
        place = starts[sequence[query]] + known[query] - 1 - age
        weight = (decay**age).astype(np.float32)
        scores = sparse.csr_array((weight, (query, items[place])), shape=(len(known), num_items)) @ weights
        # One row for each item of each sequence: a repeated pair was counted repeatedly.
        token_sequence = np.repeat(np.arange(len(lengths)), lengths)
        keys, local = np.unique(token_sequence * num_items + items, return_inverse=True)
        occurrences = sparse.csr_array((weight, (query, local[place])), shape=(len(known), len(keys)))
        scores = (scores - occurrences @ self._added(items, token_sequence, local, len(keys))).tocsr()
        scores.sort_indices()
        values = np.log1p(np.maximum(scores.data, 0) / np.float32(floor))
        rows = np.repeat(np.arange(len(known)), np.diff(scores.indptr))
        large = values > SMALLEST
        return Entries(rows[large], scores.indices[large].astype(np.int64), values[large].astype(np.float32))

    def _added(
        self, items: np.ndarray, sequence: np.ndarray, local: np.ndarray, rows: int
    ) -> sparse.csr_array:
        """Return the contribution of the sequences themselves to the scaled counts of their items, (rows, I).

        `items` (T,) from 0, `sequence` (T,) the number of each item's sequence, `local` (T,) its row.
        """
        from scipy import sparse

        _, row_scale, column_scale = self.arrays()
        backward, _, _, window, _ = self.settings.tolist()
        near = [np.flatnonzero(sequence[d:] == sequence[:-d]) for d in range(1, int(window) + 1)]
        first = np.concatenate(near)
        distance = np.repeat(np.arange(1, len(near) + 1), [len(part) for part in near])
        second, forward = first + distance, 1 / distance
        value = np.concatenate((forward, backward * forward))
        row, column = np.concatenate((first, second)), np.concatenate((second, first))
        value = (value * row_scale[items[row]] * column_scale[items[column]]).astype(np.float32)
        return sparse.csr_array((value, (local[row], items[column])), shape=(rows, len(row_scale)))

    def for_samples(self, samples: Samples, causal: bool, order: np.ndarray) -> Entries:
        """Return the prior of the targets of samples, in `order` (M,)."""
        tokens, lengths, sequence, known = whole_sequences(samples, causal)
        return self.entries(tokens, lengths, sequence[order], known[order])

    def for_histories(self, histories: Histories, users: np.ndarray) -> Entries:
        """Return the prior of the next item after the histories of `users`."""
        chosen = histories.rows(users)
        tokens = chosen.items[chosen.places()]
        return self.entries(tokens, chosen.lengths, np.arange(len(users)), chosen.lengths)

    @torch.no_grad()
    def add_to(self, scores: Tensor, histories: Histories, users: np.ndarray) -> None:
        """Add the scaled prior of `users` to their scores (B, I), in place."""
        rows, columns, values = (
            torch.from_numpy(a).to(scores.device) for a in self.for_histories(histories, users)
        )
        scores.view(-1).index_add_(0, rows * scores.shape[1] + columns, values * self.scale.to(values.device))
