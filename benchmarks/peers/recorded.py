"""What peers reached, as a table, and as records of a grid: compared with its own models user by user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scoring import NAMES, OURS, Run, finished

from reclib import records
from reclib.config import InputError
from reclib.evaluate import metrics, statistics
from reclib.experiments import baseline, grids
from reclib.experiments.baseline import Result
from reclib.experiments.grids import Work

MINE = "BERT4Rec (ours)"


def table(folder: Path, fingerprint: str, samples: int = 2000) -> list[str]:
    """Return lines: each model's test metrics, mean over its seeds per user, with 95 % intervals over users.

    The last columns are the paired difference, ours minus the model, for each of our models there.
    """

    def interval(values: np.ndarray) -> str:
        one = statistics.bootstrap(values, samples)
        return f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f})"

    lines, found = [], finished(folder, fingerprint)
    for metric in NAMES:
        means = {name: stacked(runs, f"test_{metric}").mean(axis=0) for name, runs in found.items()}
        for name, values in means.items():
            line = f"{metric:8} {name:28} seeds {len(found[name])}  {interval(values)}"
            for ours in (n for n in means if n.startswith(OURS) and n != name):
                line += f"  {ours} minus it {interval(means[ours] - values)}"
            lines.append(line)
    return lines


def stacked(runs: list[Run], name: str) -> np.ndarray:
    """Return a value per seed and user, (S, U)."""
    return np.stack([arrays[name] for _, arrays in runs])


def curve_results(folder: Path, work: Work) -> list[Result]:
    """Return validation after equal training time: each curve, and each peer minus ours at each mark.

    All differences are corrected together, for all peers and marks.
    """
    curves = finished(folder, work.dataset.fingerprint, curves=True)
    curves = {MINE if name.startswith(OURS) else name: runs for name, runs in curves.items()}
    found = [curve_result(name, runs) for name, runs in curves.items()]
    if MINE not in curves or len(curves) < 2:
        return found
    mine = by_minute(curves.pop(MINE))
    gaps, of = {}, {}
    for name, runs in curves.items():
        for minute, theirs in by_minute(runs).items():
            if minute in mine:
                key = f"{name} after {minute:g}"
                gaps[key], of[key] = theirs - mine[minute].mean(axis=0), (name, minute)
    ours = np.zeros_like(next(iter(mine.values())))  # each gap is against ours at its own mark
    for one in statistics.compare({MINE: ours} | gaps, MINE):
        name, minute = of[one.name]
        result = baseline.compared(one._replace(name=name), "ndcg@10", "equal_time_comparison")
        found.append(result._replace(params=result.params | {"minutes": minute}))
    return found


def by_minute(runs: list[Run]) -> dict[float, np.ndarray]:
    """Return NDCG@10 per seed and user (S, U) at each mark that every seed reached."""
    found = [dict(zip(a["mark_minutes"].tolist(), a["mark_ndcg@10"], strict=True)) for _, a in runs]
    everywhere = [minute for minute in found[0] if all(minute in one for one in found)]
    return {minute: np.stack([one[minute] for one in found]) for minute in everywhere}


def curve_result(name: str, runs: list[Run]) -> Result:
    """Return one curve: the mean over its seeds, with intervals over users, and what starting up took."""
    reached = by_minute(runs)
    ends = [statistics.bootstrap(values.mean(axis=0), grids.SAMPLES) for values in reached.values()]
    epochs = np.mean([arrays["look_epoch"][: len(reached)] for _, arrays in runs], axis=0)
    series = {"minutes": list(reached), "ndcg@10": [end.mean for end in ends], "epoch": epochs.tolist()}
    series |= {"ndcg@10_low": [end.low for end in ends], "ndcg@10_high": [end.high for end in ends]}
    startup = float(np.mean([said["reported"]["startup_seconds"] for said, _ in runs]))
    numbers = {"startup_seconds": startup, "seeds": float(len(runs))}
    return Result("equal_time", numbers, {"model": name, "run": settings_of(runs[0][0])}, series)


def peer_results(folder: Path, work: Work) -> list[Result]:
    """Return every peer's test metrics, and its difference from ours, corrected for their number."""
    found = finished(folder, work.dataset.fingerprint)
    # The grid's own models stand for ours.
    peers = {name: runs for name, runs in found.items() if not name.startswith(OURS)}
    if not peers:
        raise InputError(f"{folder}: no finished peer on this data (fingerprint {work.dataset.fingerprint})")
    scored, results = arms_of(work), []
    for peer, runs in peers.items():
        values = {name: stacked(runs, f"test_{name}") for name in NAMES}
        means = {name: statistics.bootstrap(v.mean(axis=0), grids.SAMPLES) for name, v in values.items()}
        results.append(Result("test_metrics", baseline.flat(means), {"model": peer}, {}))
        for place, (said, _) in enumerate(runs):
            numbers = {name: float(rows[place].mean()) for name, rows in values.items()}
            about = {"model": peer, "run": settings_of(said)}
            results.append(Result("test_metrics", numbers, about, {}, said["identity"]["seed"]))
    for name in NAMES:
        theirs = {peer: stacked(runs, f"test_{name}") for peer, runs in peers.items()}
        for arm, values in scored[name].items():
            for one in statistics.compare(theirs | {arm: values}, arm):
                results.append(baseline.compared(one, name, "peer_comparison"))
    return results


def arms_of(work: Work) -> dict[str, dict[str, np.ndarray]]:
    """Return the values per seed and user (S, U) of the grid's scored arms, by metric and arm."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in NAMES}
    for arm in work.grid.arms:
        if not arm.final or arm.split != grids.MAIN_SPLIT:
            continue
        files = [work.ranks_file(arm, seed) for seed in arm.seeds]
        ranks = [dict(np.load(file)).get("test") if file.is_file() else None for file in files]
        if any(one is None for one in ranks):
            raise InputError(f"{arm.name} is not scored yet: python -m reclib score {work.grid.name}")
        for name in NAMES:
            found[name][arm.name] = np.stack([metrics.per_user(one)[name] for one in ranks])
    return found


def settings_of(said: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to run the peer again, and what it took."""
    one = said["identity"]
    kept = {name: one[name] for name in ("settings", "epochs", "minutes", "patience", "threads", "hidden")}
    return kept | {"version": said["reported"].get("version"), "wall_seconds": said["wall_seconds"]}


def write(folder: Path, work: Work) -> list[Result]:
    """Append the peers' results to the grid's records and return them.

    Curves need no scored grid: they are of validation alone.
    """
    found = curve_results(folder, work)
    if not found or any(not name.startswith(OURS) for name in finished(folder, work.dataset.fingerprint)):
        found += peer_results(folder, work)
    for result in found:
        identity = {"peer": result.params, "seed": result.seed, "data": work.dataset.fingerprint}
        work.write(records.params_hash(identity), result, {}, {})
    return found
