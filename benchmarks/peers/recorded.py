"""What peers reached, as records of a grid: compared with its own models, or curve with curve."""

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


def stacked(runs: list[Run], name: str) -> np.ndarray:
    """Return a value per seed and user, (S, U)."""
    return np.stack([arrays[name] for _, arrays in runs])


def curve_results(folder: Path, work: Work) -> list[Result]:
    """Return validation after equal training time: each curve, and differences at each mark.

    Every other curve minus ours as published is an `equal_time_comparison`: engine and settings together. A
    peer's BERT4Rec minus our engine with that peer's settings and width is an `equal_recipe_comparison`: the
    engine alone. All differences are corrected together, for all curves and marks.
    """
    curves = finished(folder, work.dataset.fingerprint, curves=True)
    results = [curve_result(name, runs) for name, runs in curves.items()]
    compared, p_values = {}, {}
    for reference, runs in curves.items():
        identity, at_marks = runs[0][0]["identity"], by_minute(runs)
        if identity["peer"] != OURS:
            continue
        kind, twin = "equal_time_comparison", None
        if "recipe" in identity:
            kind, twin = "equal_recipe_comparison", (identity["recipe"], "bert4rec", identity["hidden"])
        others = {
            name: by_minute(other)
            for name, other in curves.items()
            if name != reference and twin in (None, model_of(other[0][0]["identity"]))
        }
        for minute, ours in at_marks.items():
            values = {name: marks[minute] for name, marks in others.items() if minute in marks}
            for row in statistics.compare({reference: ours} | values, reference) if values else ():
                key = f"{row.name} minus {reference} after {minute:g}"
                compared[key], p_values[key] = (row, kind, minute), row.p_value
    adjusted = statistics.holm(p_values)
    for key, (row, kind, minute) in compared.items():
        result = baseline.compared(row._replace(adjusted_p=adjusted[key]), "ndcg@10", kind)
        results.append(result._replace(params=result.params | {"minutes": minute}))
    return results


def model_of(identity: dict[str, Any]) -> tuple[str, str, int]:
    """Return what a peer trained."""
    return identity["peer"], identity["model"], identity["hidden"]


def by_minute(runs: list[Run]) -> dict[float, np.ndarray]:
    """Return NDCG@10 per seed and user (S, U) at each mark that every seed reached."""
    marks = [dict(zip(a["mark_minutes"].tolist(), a["mark_ndcg@10"], strict=True)) for _, a in runs]
    return {
        minute: np.stack([values[minute] for values in marks])
        for minute in marks[0]
        if all(minute in values for values in marks)
    }


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


def peer_results(folder: Path, work: Work) -> list[Result]:
    """Return every peer's test metrics, and its differences from the grid's models, corrected."""
    peers = peers_of(folder, work)
    if not peers:
        raise InputError(f"{folder}: no finished peer on this data (fingerprint {work.dataset.fingerprint})")
    scored, results = arms_of(work), []
    for peer, runs in peers.items():
        values = {name: stacked(runs, f"test_{name}") for name in NAMES}
        means = {name: statistics.bootstrap(v.mean(axis=0), grids.SAMPLES) for name, v in values.items()}
        results.append(Result("test_metrics", baseline.flat(means), {"model": peer}, {}))
        for place, (about, _) in enumerate(runs):
            numbers = {name: float(rows[place].mean()) for name, rows in values.items()}
            own = {"model": peer, "run": settings_of(about)}
            results.append(Result("test_metrics", numbers, own, {}, about["identity"]["seed"]))
    for name in NAMES:
        theirs = {peer: stacked(runs, f"test_{name}") for peer, runs in peers.items()}
        for arm, values in scored[name].items():
            for row in statistics.compare(theirs | {arm: values}, arm):
                results.append(baseline.compared(row, name, "peer_comparison"))
    return results


def peers_of(folder: Path, work: Work) -> dict[str, list[Run]]:
    """Return the finished runs of peers alone: the grid's own models stand for ours."""
    runs = finished(folder, work.dataset.fingerprint)
    return {name: of for name, of in runs.items() if of[0][0]["identity"]["peer"] != OURS}


def arms_of(work: Work) -> dict[str, dict[str, np.ndarray]]:
    """Return the values per seed and user (S, U) of the grid's scored arms, by metric and arm."""
    values: dict[str, dict[str, np.ndarray]] = {name: {} for name in NAMES}
    for arm in work.grid.arms:
        if not arm.final or arm.split != grids.MAIN_SPLIT:
            continue
        files = [work.ranks_file(arm, seed) for seed in arm.seeds]
        ranks = [dict(np.load(file)).get("test") if file.is_file() else None for file in files]
        if any(seed is None for seed in ranks):
            raise InputError(f"{arm.name} is not scored yet: python -m reclib score {work.grid.name}")
        for name in NAMES:
            values[name][arm.name] = np.stack([metrics.per_user(seed)[name] for seed in ranks])
    return values


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
    results = curve_results(folder, work)
    if not results or peers_of(folder, work):
        results += peer_results(folder, work)
    for result in results:
        params = {name: value for name, value in result.params.items() if name != "run"}
        identity = {"peer": params, "seed": result.seed, "data": work.dataset.fingerprint}
        work.write(records.params_hash(identity), result, {}, {})
    return results
