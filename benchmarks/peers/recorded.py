"""What peers reached, as records of a grid: beside its own models, and compared with them user by user."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scoring import NAMES, OURS

from reclib import assessment, metrics, record, scoring, statistics
from reclib.assessment import Result
from reclib.config import InputError
from reclib.grid import Work

DISPLAY = {
    ("rectools", "bert4rec"): "RecTools BERT4Rec",
    ("rectools", "sasrec"): "RecTools SASRec",
    ("replay", "bert4rec"): "RePlay BERT4Rec",
    ("recbole", "bert4rec"): "RecBole BERT4Rec",
}


def ours(work: Work) -> dict[str, dict[str, np.ndarray]]:
    """Return the values per seed and user (S, U) of the grid's scored arms, by metric and arm."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in NAMES}
    for arm in work.grid.arms:
        if not arm.final or arm.split != scoring.MAIN_SPLIT:
            continue
        files = [work.ranks_file(arm, seed) for seed in arm.seeds]
        ranks = [dict(np.load(file)).get("test") for file in files if file.is_file()]
        if len(ranks) < len(files) or any(one is None for one in ranks):
            raise InputError(f"{arm.name} is not scored yet: python -m reclib.scoring {work.grid.name}")
        for name in NAMES:
            found[name][arm.name] = np.stack([metrics.per_user(one)[name] for one in ranks])
    return found


Run = tuple[dict[str, Any], dict[str, np.ndarray]]  # what a peer's JSON says, and its values per user


def results_of(folder: Path, fingerprint: str) -> dict[str, list[Run]]:
    """Return each peer's finished runs on this data, curves apart."""
    found: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        said = json.loads(path.read_text())
        one = said["identity"]
        if one["fingerprint"] == fingerprint and not one["marks"] and one["peer"] != OURS:
            name = f"{DISPLAY[one['peer'], one['model']]} (hidden {one['hidden']})"
            found[name].append((said, dict(np.load(path.with_suffix(".npz")))))
    return found


def peer_results(folder: Path, work: Work) -> list[Result]:
    """Return every peer's test metrics, and its difference from ours, corrected for their number."""
    mine, peers = ours(work), results_of(folder, work.dataset.fingerprint)
    if not peers:
        raise InputError(f"{folder}: no finished peer on this data (fingerprint {work.dataset.fingerprint})")
    found = []
    for peer, runs in peers.items():
        values = {name: np.stack([arrays[f"test_{name}"] for _, arrays in runs]) for name in NAMES}
        means = {name: metrics.bootstrap(rows.mean(axis=0), scoring.SAMPLES) for name, rows in values.items()}
        found.append(Result("test_metrics", assessment.flat(means), {"model": peer}, {}))
        for place, (said, _) in enumerate(runs):
            numbers = {name: float(rows[place].mean()) for name, rows in values.items()}
            seed = said["identity"]["seed"]
            found.append(Result("test_metrics", numbers, {"model": peer, "run": _settings(said)}, {}, seed))
    for name in NAMES:
        theirs = {peer: np.stack([a[f"test_{name}"] for _, a in runs]) for peer, runs in peers.items()}
        for arm, values in mine[name].items():
            for one in statistics.compare(theirs | {arm: values}, arm, (), scoring.SAMPLES):
                found.append(assessment.compared(one, name, "peer_comparison"))
    return found


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to run the peer again, and what it took."""
    one = said["identity"]
    kept = {name: one[name] for name in ("settings", "epochs", "patience", "threads", "hidden")}
    return kept | {"version": said["reported"].get("version"), "wall_seconds": said["wall_seconds"]}


def write(folder: Path, work: Work) -> list[Result]:
    """Append the peers' results to the grid's records and return them."""
    found = peer_results(folder, work)
    for result in found:
        identity = {"peer": result.params, "seed": result.seed, "data": work.dataset.fingerprint}
        work.write(record.params_hash(identity), result, {}, {})
    return found
