"""What the peers read, the score of what they recommend, and both as records of a grid.

Runs in this project's own environment.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reclib import records
from reclib.config import InputError
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.evaluate import metrics, statistics
from reclib.experiments import baseline, grids
from reclib.experiments.baseline import Result
from reclib.experiments.grids import Work, save_ranks

NAMES, OURS = ("hr@10", "ndcg@10"), "reclib"
DISPLAY = {
    ("rectools", "bert4rec"): "RecTools BERT4Rec",
    ("rectools", "sasrec"): "RecTools SASRec",
    ("rectools", "fast-sasrec"): "RecTools fast SASRec",
    ("replay", "bert4rec"): "RePlay BERT4Rec",
}
Arrays = dict[str, np.ndarray]
Run = tuple[dict[str, Any], Arrays]  # the JSON of a run, and its values per user


def write_sequences(dataset: Dataset, path: Path) -> None:
    """Write the npz that the peers read: all but each user's last two items, and those two apart.

    `valid` and `test` are 0 for a user with fewer than three interactions, whose whole history trains.
    """
    train = train_histories(dataset)
    offsets = np.concatenate([[0], np.cumsum(train.lengths)])
    arrays = {"items": dataset.items[train.places()], "offsets": offsets}
    arrays["num_items"] = np.int64(dataset.num_items)
    for part in ("valid", "test"):
        arrays[part] = np.zeros(dataset.num_users, dtype=np.int32)
        arrays[part][evaluated_users(dataset)] = evaluation(dataset, part).targets
    save_ranks(path, arrays)


def is_seen(items: np.ndarray, part: Evaluation, num_items: int) -> np.ndarray:
    """Return for item ids (rows, k) whether each is in the history of its row's user."""
    users = np.arange(len(part.targets))
    rows, seen = metrics.seen_items(part.histories, users, torch.device("cpu"))
    width = num_items + 1  # a pair of row and item as one number
    return np.isin(users[:, None] * width + items, rows.numpy() * width + seen.numpy()) & (items > 0)


def ranks_in(top: np.ndarray, part: Evaluation, num_items: int, where: str) -> np.ndarray:
    """Return where the targets stand in recommendations (rows, k) of item ids, 0 for none.

    A target that was not recommended ranks last. Raises `InputError`, naming `where`, for ids outside the
    catalogue, an item twice in a row, and an item that the user has had.
    """
    if len(top) != len(part.targets):
        raise InputError(f"{where}: {len(top)} rows of recommendations for {len(part.targets)} users")
    if top.min(initial=0) < 0 or top.max(initial=0) > num_items:
        raise InputError(f"{where}: item ids from {top.min()} to {top.max()}, allowed: 0 to {num_items}")
    ordered = np.sort(top, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any(axis=1)
    if twice.any():
        raise InputError(f"{where}: row {int(np.argmax(twice))} recommends an item twice")
    for row, place in np.argwhere(is_seen(top, part, num_items))[:1]:
        raise InputError(f"{where}: row {row} recommends item {top[row, place]}, seen by its user")
    places = top == part.targets[:, None]
    return np.where(places.any(axis=1), places.argmax(axis=1) + 1, max(num_items, top.shape[1] + 1))


def values_of(ranks: np.ndarray, prefix: str) -> Arrays:
    """Return HR@10 and NDCG@10 per user, float64, on the last axis of `ranks`."""
    values = metrics.per_user(ranks)
    return {f"{prefix}_{name}": values[name] for name in NAMES}


def score(arrays: Mapping[str, np.ndarray], dataset: Dataset, where: str) -> Arrays:
    """Return the values per user of what a peer recommended: on validation and test, or at the marks."""
    users = evaluated_users(dataset)
    values = {name: array for name, array in arrays.items() if not name.endswith("top")} | {"users": users}

    def ranks(top: np.ndarray, part: str) -> np.ndarray:
        return ranks_in(top[users], evaluation(dataset, part), dataset.num_items, where)

    if "mark_top" in arrays:
        return values | values_of(np.array([ranks(top, "valid") for top in arrays["mark_top"]]), "mark")
    values |= values_of(ranks(arrays["valid_top"], "valid"), "valid")
    return values | values_of(ranks(arrays["top"], "test"), "test")


# -- finished runs -------------------------------------------------------------------------------------------


def finished(folder: Path, fingerprint: str, curves: bool) -> dict[str, list[Run]]:
    """Return the finished runs or curves on this data, by a name of what was run."""
    runs: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        identity = about["identity"]
        if identity["fingerprint"] == fingerprint and bool(identity["marks"]) == curves:
            runs[label(identity)].append((about, dict(np.load(path.with_suffix(".npz")))))
    return runs


def label(identity: dict[str, Any]) -> str:
    """Return the name of a run: a peer's with its settings in place of its own defaults."""
    peer, hidden, settings = identity["peer"], identity["hidden"], identity["settings"]
    if "recipe" in identity:
        owner = {"rectools": "RecTools'", "replay": "RePlay's"}[identity["recipe"]]
        return f"our engine, {owner} settings (hidden {hidden})"
    if peer == OURS:  # a curve is one with the published settings
        return "BERT4Rec (ours)" if identity["marks"] else f"{OURS} {identity['model']} h{hidden}"
    loss = f", {settings['negatives']} negatives" if settings.get("loss") == "sampled" else ""
    return f"{DISPLAY[peer, identity['model']]} (hidden {hidden}{loss})"


# -- curves over training time -------------------------------------------------------------------------------


def curve_results(folder: Path, work: Work) -> list[Result]:
    """Return validation after equal training time: each curve, and differences at each mark.

    Every other curve minus ours as published is an `equal_time_comparison`: engine and settings together. A
    peer's BERT4Rec minus our engine with that peer's settings and width is an `equal_recipe_comparison`: the
    engine alone. All differences are corrected together, for all curves and marks.
    """
    curves = finished(folder, work.dataset.fingerprint, curves=True)
    comparisons, results = [], [curve_result(name, runs) for name, runs in curves.items()]
    for reference, runs in curves.items():
        identity = identity_of(runs)
        if identity["peer"] != OURS:
            continue
        kind, others = "equal_time_comparison", {n: by_minute(c) for n, c in curves.items() if n != reference}
        if "recipe" in identity:
            kind, twin = "equal_recipe_comparison", (identity["recipe"], "bert4rec", identity["hidden"])
            others = {name: marks for name, marks in others.items() if trained_by(curves[name]) == twin}
        for minute, ours in by_minute(runs).items():
            values = {name: marks[minute] for name, marks in others.items() if minute in marks}
            for row in statistics.compare({reference: ours} | values, reference):
                comparisons.append((row, kind, minute))
    adjusted = statistics.holm({str(place): row.p_value for place, (row, *_) in enumerate(comparisons)})
    for (row, kind, minute), p in zip(comparisons, adjusted.values(), strict=True):
        result = baseline.compared(row._replace(adjusted_p=p), "ndcg@10", kind)
        results.append(result._replace(params=result.params | {"minutes": minute}))
    return results


def identity_of(runs: list[Run]) -> dict[str, Any]:
    """Return the settings that the runs share, with the seed of the first."""
    return runs[0][0]["identity"]


def trained_by(runs: list[Run]) -> tuple[str, str, int]:
    """Return peer, model and hidden size of runs."""
    identity = identity_of(runs)
    return identity["peer"], identity["model"], identity["hidden"]


def by_minute(runs: list[Run]) -> dict[float, np.ndarray]:
    """Return NDCG@10 per seed and user (S, U) at each mark that every seed reached."""
    marks = [dict(zip(a["mark_minutes"].tolist(), a["mark_ndcg@10"], strict=True)) for _, a in runs]
    common = [minute for minute in marks[0] if all(minute in values for values in marks)]
    return {minute: np.stack([values[minute] for values in marks]) for minute in common}


def curve_result(name: str, runs: list[Run]) -> Result:
    """Return one curve: the mean over its seeds, with intervals over users, and what starting up took."""
    reached = by_minute(runs)
    ends = [statistics.bootstrap(values.mean(axis=0), grids.SAMPLES) for values in reached.values()]
    epochs = np.mean([arrays["look_epoch"][: len(reached)] for _, arrays in runs], axis=0)
    series = {"minutes": list(reached), "ndcg@10": [end.mean for end in ends], "epoch": epochs.tolist()}
    series |= {"ndcg@10_low": [end.low for end in ends], "ndcg@10_high": [end.high for end in ends]}
    startup = float(np.mean([about["reported"]["startup_seconds"] for about, _ in runs]))
    numbers = {"startup_seconds": startup, "seeds": float(len(runs))}
    return Result("equal_time", numbers, {"model": name, "run": settings_of(runs[0][0])}, series)


# -- the test split ------------------------------------------------------------------------------------------


def peer_results(peers: dict[str, list[Run]], work: Work) -> list[Result]:
    """Return every peer's test metrics, and its differences from the grid's models, corrected."""
    scored, results = arms_of(work), []
    values = {
        name: {peer: np.stack([arrays[f"test_{name}"] for _, arrays in runs]) for peer, runs in peers.items()}
        for name in NAMES
    }
    for peer, runs in peers.items():
        means = {n: statistics.bootstrap(values[n][peer].mean(axis=0), grids.SAMPLES) for n in NAMES}
        results.append(Result("test_metrics", baseline.flat(means), {"model": peer}))
        for place, (about, _) in enumerate(runs):
            numbers = {name: float(values[name][peer][place].mean()) for name in NAMES}
            own = {"model": peer, "run": settings_of(about)}
            results.append(Result("test_metrics", numbers, own, seed=about["identity"]["seed"]))
    for name in NAMES:
        for arm, ranks in scored.items():
            of_arm = np.stack([metrics.per_user(of_seed)[name] for of_seed in ranks])
            rows = statistics.compare(values[name] | {arm: of_arm}, arm)
            results += [baseline.compared(row, name, "peer_comparison") for row in rows]
    return results


def arms_of(work: Work) -> dict[str, list[np.ndarray]]:
    """Return the test ranks of the grid's final arms, an array per seed."""
    ranks = {}
    for arm in (arm for arm in work.grid.arms if arm.final and arm.split == grids.MAIN_SPLIT):
        stored = [grids.stored_ranks(work, arm, seed) for seed in arm.seeds]
        if not all(stored):
            raise InputError(f"{arm.name} is not scored yet: python -m reclib score {work.grid.name}")
        ranks[arm.name] = [arrays["test"] for arrays in stored]
    return ranks


def settings_of(about: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to run the peer again, and what it took."""
    names = ("settings", "epochs", "minutes", "patience", "threads", "hidden", "recipe")
    settings = {name: about["identity"][name] for name in names if name in about["identity"]}
    return settings | {"version": about["reported"].get("version"), "wall_seconds": about["wall_seconds"]}


def write(folder: Path, work: Work) -> list[Result]:
    """Append the peers' results to the grid's records and return them.

    Curves need no scored grid: they are of validation alone. A result takes the place of an earlier one of
    the same model, whatever the settings and the seconds of its run.
    """
    runs = finished(folder, work.dataset.fingerprint, curves=False)
    # The grid's own models stand for ours.
    peers = {name: of_peer for name, of_peer in runs.items() if identity_of(of_peer)["peer"] != OURS}
    results = curve_results(folder, work)
    if not results and not peers:
        raise InputError(f"{folder}: no finished peer on this data (fingerprint {work.dataset.fingerprint})")
    results += peer_results(peers, work) if peers else []
    for result in results:
        params = {name: value for name, value in result.params.items() if name != "run"}
        identity = {"peer": params, "seed": result.seed, "data": work.dataset.fingerprint}
        work.write(records.params_hash(identity), result, {}, {})
    return results
