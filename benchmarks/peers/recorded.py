"""What peers reached, as records of a grid: beside its own models, and compared with them user by user."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scoring import NAMES, OURS

from reclib import records
from reclib.config import InputError
from reclib.evaluate import metrics, statistics
from reclib.experiments import baseline, grids
from reclib.experiments.baseline import Result
from reclib.experiments.grids import Work

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
        if not arm.final or arm.split != grids.MAIN_SPLIT:
            continue
        files = [work.ranks_file(arm, seed) for seed in arm.seeds]
        ranks = [dict(np.load(file)).get("test") for file in files if file.is_file()]
        if len(ranks) < len(files) or any(one is None for one in ranks):
            raise InputError(f"{arm.name} is not scored yet: python -m reclib score {work.grid.name}")
        for name in NAMES:
            found[name][arm.name] = np.stack([metrics.per_user(one)[name] for one in ranks])
    return found


Run = tuple[dict[str, Any], dict[str, np.ndarray]]  # what a run's JSON says, and its values per user
MINE = "BERT4Rec (ours)"


def results_of(folder: Path, fingerprint: str, curves: bool = False) -> dict[str, list[Run]]:
    """Return the finished runs on this data by name: each peer's, or the curves, with ours among them."""
    found: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        said = json.loads(path.read_text())
        one = said["identity"]
        if one["fingerprint"] != fingerprint or bool(one["marks"]) != curves:
            continue
        if one["peer"] == OURS and not curves:
            continue  # the grid's own models stand for ours
        name = _named(one) if one["peer"] != OURS else MINE
        found[name].append((said, dict(np.load(path.with_suffix(".npz")))))
    return found


def _named(one: dict[str, Any]) -> str:
    """Return a peer's name with what it was given in place of its own defaults."""
    sampled = one["settings"].get("loss") == "sampled"
    loss = f", {one['settings']['negatives']} negatives" if sampled else ""
    return f"{DISPLAY[one['peer'], one['model']]} (hidden {one['hidden']}{loss})"


def curve_results(folder: Path, work: Work) -> list[Result]:
    """Return validation after equal training time: each curve, and each peer minus ours at each mark.

    All differences are corrected together, for all peers and marks.
    """
    curves = results_of(folder, work.dataset.fingerprint, curves=True)
    found = [_curve(name, runs) for name, runs in curves.items()]
    if MINE not in curves or len(curves) < 2:
        return found
    mine = _by_minute(curves.pop(MINE))
    gaps, of = {}, {}
    for name, runs in curves.items():
        for minute, theirs in _by_minute(runs).items():
            if minute in mine:
                key = f"{name} after {minute:g}"
                gaps[key], of[key] = theirs - mine[minute].mean(axis=0), (name, minute)
    ours = np.zeros_like(next(iter(mine.values())))  # each gap is against ours at its own mark
    for one in statistics.compare({MINE: ours} | gaps, MINE):
        name, minute = of[one.name]
        result = baseline.compared(one._replace(name=name), "ndcg@10", "equal_time_comparison")
        found.append(result._replace(params=result.params | {"minutes": minute}))
    return found


def _by_minute(runs: list[Run]) -> dict[float, np.ndarray]:
    """Return NDCG@10 per seed and user (S, U) at each mark that every seed reached."""
    found = [
        dict(zip(arrays["mark_minutes"].tolist(), arrays["mark_ndcg@10"], strict=True)) for _, arrays in runs
    ]
    everywhere = [minute for minute in found[0] if all(minute in one for one in found)]
    return {minute: np.stack([one[minute] for one in found]) for minute in everywhere}


def _curve(name: str, runs: list[Run]) -> Result:
    """Return one curve: the mean over its seeds, with intervals over users, and what starting up took."""
    reached = _by_minute(runs)
    ends = [statistics.bootstrap(values.mean(axis=0), grids.SAMPLES) for values in reached.values()]
    epochs = np.mean([arrays["look_epoch"][: len(reached)] for _, arrays in runs], axis=0)
    series = {"minutes": list(reached), "ndcg@10": [end.mean for end in ends], "epoch": epochs.tolist()}
    series |= {"ndcg@10_low": [end.low for end in ends], "ndcg@10_high": [end.high for end in ends]}
    startup = float(np.mean([said["reported"]["startup_seconds"] for said, _ in runs]))
    numbers = {"startup_seconds": startup, "seeds": float(len(runs))}
    return Result("equal_time", numbers, {"model": name, "run": _settings(runs[0][0])}, series)


def peer_results(folder: Path, work: Work) -> list[Result]:
    """Return every peer's test metrics, and its difference from ours, corrected for their number."""
    peers = results_of(folder, work.dataset.fingerprint)
    if not peers:
        raise InputError(f"{folder}: no finished peer on this data (fingerprint {work.dataset.fingerprint})")
    mine, found = ours(work), []
    for peer, runs in peers.items():
        values = {name: np.stack([arrays[f"test_{name}"] for _, arrays in runs]) for name in NAMES}
        means = {
            name: statistics.bootstrap(rows.mean(axis=0), grids.SAMPLES) for name, rows in values.items()
        }
        found.append(Result("test_metrics", baseline.flat(means), {"model": peer}, {}))
        for place, (said, _) in enumerate(runs):
            numbers = {name: float(rows[place].mean()) for name, rows in values.items()}
            seed = said["identity"]["seed"]
            found.append(Result("test_metrics", numbers, {"model": peer, "run": _settings(said)}, {}, seed))
    for name in NAMES:
        theirs = {peer: np.stack([a[f"test_{name}"] for _, a in runs]) for peer, runs in peers.items()}
        for arm, values in mine[name].items():
            for one in statistics.compare(theirs | {arm: values}, arm):
                found.append(baseline.compared(one, name, "peer_comparison"))
    return found


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to run the peer again, and what it took."""
    one = said["identity"]
    kept = {name: one[name] for name in ("settings", "epochs", "minutes", "patience", "threads", "hidden")}
    return kept | {"version": said["reported"].get("version"), "wall_seconds": said["wall_seconds"]}


def write(folder: Path, work: Work) -> list[Result]:
    """Append the peers' results to the grid's records and return them.

    Curves need no scored grid: they are of validation alone.
    """
    found = curve_results(folder, work)
    if not found or results_of(folder, work.dataset.fingerprint):
        found += peer_results(folder, work)
    for result in found:
        identity = {"peer": result.params, "seed": result.seed, "data": work.dataset.fingerprint}
        work.write(records.params_hash(identity), result, {}, {})
    return found
