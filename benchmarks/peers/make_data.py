"""Writes the npz files that the peer scripts read, for trials without the project's own data code.

python make_data.py synthetic OUT.npz --users 3000 --items 160000
python make_data.py ml-100k OUT.npz --ratings u.data[.gz]
"""

import argparse
import gzip
from pathlib import Path

import numpy as np


def synthetic(users: int, items: int, mean: float, max_len: int, seed: int) -> dict:
    """Lengths from 5 on with the given mean, items by a power law; nothing held out."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(4 + rng.geometric(1 / (mean - 4), size=users), max_len)
    # One row of full length, for the library that pads to the longest row of its file.
    lengths[0] = max_len
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = 1 / np.arange(1, items + 1) ** 0.8
    edges = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(edges, rng.random(offsets[-1]), side="right")
    # A random relabelling, so that popular ids do not lie side by side in the table.
    drawn = rng.permutation(items)[np.minimum(drawn, items - 1)] + 1
    return {"items": drawn.astype(np.int32), "offsets": offsets, "num_items": items}


def ml_100k(ratings: Path) -> dict:
    """5-core and leave-one-out: the last item is the test, the one before it the validation."""
    opener = gzip.open if ratings.suffix == ".gz" else open
    with opener(ratings, "rt") as file:
        rows = np.loadtxt(file, dtype=np.int64)
    # A stable sort by user and time: rows of one second keep the order of the file.
    rows = rows[np.lexsort((rows[:, 3], rows[:, 0]))]
    while True:
        keep = np.ones(len(rows), dtype=bool)
        for column in (0, 1):
            _, inverse, counts = np.unique(rows[:, column], return_inverse=True, return_counts=True)
            keep &= counts[inverse] >= 5
        if keep.all():
            break
        rows = rows[keep]
    originals, dense = np.unique(rows[:, 1], return_inverse=True)
    _, starts = np.unique(rows[:, 0], return_index=True)
    sequences = np.split((dense + 1).astype(np.int32), starts[1:])
    train = [sequence[:-2] for sequence in sequences]
    return {
        "items": np.concatenate(train),
        "offsets": np.concatenate([[0], np.cumsum([len(one) for one in train])]).astype(np.int64),
        "num_items": len(originals),
        "valid": np.array([sequence[-2] for sequence in sequences], dtype=np.int32),
        "test": np.array([sequence[-1] for sequence in sequences], dtype=np.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["synthetic", "ml-100k"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--items", type=int, default=160_000)
    parser.add_argument("--mean-length", type=float, default=9.4)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratings", type=Path)
    args = parser.parse_args()
    if args.kind == "synthetic":
        data = synthetic(args.users, args.items, args.mean_length, args.max_len, args.seed)
    else:
        if args.ratings is None:
            parser.error("ml-100k needs --ratings")
        data = ml_100k(args.ratings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **data)
    lengths = np.diff(data["offsets"])
    print(
        f"{len(lengths)} users, {data['num_items']} items, {len(data['items'])} interactions, "
        f"length {lengths.mean():.2f} on average, {lengths.max()} at most"
    )


if __name__ == "__main__":
    main()
