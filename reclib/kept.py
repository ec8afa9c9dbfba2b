"""Models to keep: weights, configuration and what the ids mean, in a folder; used in three lines.

    from reclib import kept
    model = kept.load("w64d2-ml-100k")
    model.recommend(["50", "181", "172"])

A folder `models/<size>-<dataset>` holds `model.safetensors`, `config.json` (fields of `ModelConfig`) and
`manifest.json`: the items' keys and titles, what it was trained on and how well it ranked validation, and the
sha256 of the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from reclib import metrics, paths
from reclib.config import InputError, ModelConfig, TrainConfig, validated
from reclib.data import Dataset, Evaluation
from reclib.dataset import Histories
from reclib.model import Bert4Rec
from reclib.checkpoint import load_unique, unique_tensors
from reclib.provenance import plain

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"


class Recommendation(NamedTuple):
    """One recommended item."""

    key: str  # raw id, as in the interactions
    title: str


@dataclass
class Recommender:
    """A trained model and its catalogue."""

    model: Bert4Rec
    keys: list[str]  # of items 1..num_items
    titles: list[str]
    about: dict[str, Any]

    def recommend(self, history: Sequence[str], k: int = 10) -> list[Recommendation]:
        """Return the k best items after a history of raw ids, oldest first, without those of the history.

        Raises `InputError` for an empty history or an id that the model does not know.
        """
        ids = {key: number for number, key in enumerate(self.keys, 1)}
        if not history:
            raise InputError("the history is empty: expected at least one item id")
        for key in history:
            if key not in ids:
                raise InputError(f"unknown item {key!r}: the model knows {len(ids):,} items of its data")
        items = np.array([ids[key] for key in history], dtype=np.int32)
        known = Histories(items, np.array([0]), np.array([len(items)]))
        unseen = next(number for number in range(1, len(ids) + 2) if number not in set(items.tolist()))
        asked = Evaluation(known, np.array([min(unseen, len(ids))], dtype=np.int32))
        scores = metrics.model_scores(self.model, asked, torch.device("cpu"))
        top = metrics.rank(scores, asked, remove_seen=True, top_k=k).top
        assert top is not None
        return [Recommendation(self.keys[i - 1], self.titles[i - 1]) for i in top[0]]


def save(
    model: Bert4Rec, train: TrainConfig, dataset: Dataset, name: str, about: Mapping[str, Any]
) -> Path:
    """Write a trained model under `models/<name>`, in place of an earlier one, whole or not at all.

    `about` goes into its manifest: metrics, code version, whatever tells where the model comes from.
    """
    folder = paths.models() / name
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {key: value.cpu().contiguous() for key, value in unique_tensors(model).items()}
    save_file(tensors, partial / WEIGHTS)
    _write(partial / CONFIG, asdict(model.config))
    manifest = {
        "sha256": _sha256(partial / WEIGHTS),
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "items": dataset.item_keys.tolist()[1:],
        "titles": [dataset.title(item) for item in range(1, dataset.num_items + 1)],
        "train": asdict(train),
        "about": dict(about),
    }
    _write(partial / MANIFEST, manifest)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def load(name: str) -> Recommender:
    """Read `models/<name>`; raise `InputError` where there is none, or it is damaged."""
    folder = paths.models() / name
    if not folder.is_dir():
        known = ", ".join(sorted(f.name for f in folder.parent.glob("*") if (f / MANIFEST).is_file()))
        raise InputError(f"no model {name!r} is kept; here: {known or 'none'}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        config = validated(ModelConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        found = _sha256(folder / WEIGHTS)
        if found != manifest["sha256"]:
            raise InputError(f"damaged model {name}: {WEIGHTS} is not the file that {MANIFEST} names")
        model = Bert4Rec(config)
        load_unique(model, load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"damaged model {name}: {type(error).__name__}: {error}") from error
    return Recommender(model.eval(), manifest["items"], manifest["titles"], manifest["about"])


def _write(file: Path, body: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(plain(dict(body)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
