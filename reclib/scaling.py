"""The scaling experiment: a law fitted to the small sizes of a grid, and its prediction of the largest.

    python -m reclib.grid run scaling-ml-1m       # the small sizes; the largest is barred
    python -m reclib.scaling predict scaling-ml-1m
    python -m reclib.grid run scaling-ml-1m       # now the largest as well
    python -m reclib.scaling report scaling-ml-1m

A prediction is a record of the grid. Its hash is over the law, what it was fitted to and what it says; the
largest size may start only after it, and its records carry that hash. Once that size has begun nothing can be
predicted any more.

Learning rates follow one rule, with a check on two sizes (`learning_rate`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from reclib import law, record
from reclib.assessment import Result
from reclib.command import Parser, exit_code
from reclib.config import InputError, changed
from reclib.data import prepare
from reclib.grid import Arm, Work, read
from reclib.hardware import resolve

BASE_WIDTH, BASE_RATE = 128, 1e-3  # the anchor of the rule; trials on ml-1m gave twice the rate


def learning_rate(width: int, base: float = BASE_RATE) -> float:
    """Return the peak learning rate of a width by the rule of this study, to two digits.

    It falls with the square root of the width: halfway, on a logarithmic scale, between a constant rate and
    the 1/width that muP gives to hidden matrices under Adam (Yang et al. 2022, arXiv 2203.03466, table 3).
    The item tables, most of the parameters here, keep a constant rate there, and one rate serves both here.
    """
    return float(f"{base * (BASE_WIDTH / width) ** 0.5:.1e}")


def arm_named(work: Work, name: str) -> Arm:
    """Return an arm of a grid by its name."""
    return next(arm for arm in work.grid.arms if arm.name == name)


def losses_of(work: Work, arm: Arm) -> dict[int, dict[str, Any]]:
    """Return the newest record of each trained seed of an arm as it is configured now."""
    keys = {work.key(arm, seed): seed for seed in arm.seeds}
    rows = [row for row in work.rows("learning_curve") if row["params_hash"] in keys]
    return {keys[row["params_hash"]]: row for row in rows if "lowest_valid_loss" in row["metrics"]}


def predict(work: Work, early: bool = False) -> Result:
    """Predict the barred arm's validation loss from the others, and record it.

    `early` takes the seeds that are trained so far, one of each size at least; the record counts them. Raises
    `InputError` where the file predicts nothing, a run is missing, or the predicted size has begun.
    """
    asked = work.grid.predicts
    if asked is None:
        raise InputError(f"grid {work.grid.name!r} predicts nothing: its file has no key `predicts`")
    target = arm_named(work, asked.of)
    if begun := [str(seed) for seed in target.seeds if _begun(work, target, seed)]:
        raise InputError(
            f"{target.name} of grid {work.grid.name!r} has begun (seed {', '.join(begun)}): "
            "what is known cannot be predicted"
        )
    rows = {name: losses_of(work, arm_named(work, name)) for name in asked.sources}
    if missing := [name for name, found in rows.items() if not found]:
        raise InputError(f"grid {work.grid.name!r}: not trained yet: {', '.join(missing)}")
    arms = {name: arm_named(work, name) for name in asked.sources}
    lacking = [f"{n} seed {s}" for n, arm in arms.items() for s in arm.seeds if s not in rows[n]]
    if lacking and not early:
        raise InputError(
            f"grid {work.grid.name!r}: not trained yet: {', '.join(lacking)}; --early predicts without them"
        )
    by_size = seeds_by_size(row for found in rows.values() for row in found.values())
    size = _non_embedding(work, target)
    try:
        numbers = law.predict(by_size, size)
    except ValueError as error:
        raise InputError(f"grid {work.grid.name!r}: {error}") from None
    series: dict[str, list[Any]] = {
        "non_embedding": list(by_size),
        "loss": [float(np.mean(values)) for values in by_size.values()],
        "seeds": [len(values) for values in by_size.values()],
    }
    of = {"of": target.name, "size": size, "seeds": min(series["seeds"])}
    inputs = sorted(row["params_hash"] for found in rows.values() for row in found.values())
    said = {"target": work.configuration(target), "fitted_to": inputs}
    result = Result("prediction", numbers, of, series)
    key = record.params_hash({"law": numbers, "of": of, "series": series, **said})
    work.write(key, result, said, {})
    return result


def _begun(work: Work, arm: Arm, seed: int) -> bool:
    return work.trained(arm, seed) or any(work.folder(arm, seed).glob("step-*"))


def _non_embedding(work: Work, arm: Arm) -> int:
    from reclib.model import count_parameters

    return count_parameters(work.configs(arm, 0)[0])["non_embedding"]


def seeds_by_size(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[float]]:
    """Return the lowest validation losses of the seeds of each size, smallest size first."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        found[float(row["metrics"]["non_embedding"])].append(row["metrics"]["lowest_valid_loss"])
    return dict(sorted(found.items()))


def outcome(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Return a grid's newest prediction beside what was measured, from its records alone.

    Keys: `prediction` (the record or None), `measured` (mean loss over seeds or None), `seeds`, `first` (when
    the first of them was recorded), `error` (predicted minus measured, nats), `relative_error`, and `naive`:
    what the same points say without a law (`law.naive`). A run counts only if it carries the hash of that
    prediction.
    """
    mine = [row for row in rows if (row.get("data") or {}).get("name") == name]
    predictions = sorted((row for row in mine if row["name"] == "prediction"), key=lambda row: row["time"])
    found: dict[str, Any] = dict.fromkeys(
        ("prediction", "measured", "seeds", "first", "error", "relative_error", "naive")
    )
    if not predictions:
        return found
    curves = [row for row in mine if row["name"] == "learning_curve"]
    carried = {row["configuration"].get("prediction") for row in curves}
    held = [row for row in predictions if row["params_hash"] in carried] or predictions
    one = found["prediction"] = held[-1]
    points = one["series"]
    if len(points.get("loss", ())) > 1:
        found["naive"] = law.naive(points["non_embedding"], points["loss"], one["own_params"]["size"])
    runs = [row for row in curves if row["configuration"].get("prediction") == one["params_hash"]]
    if runs:
        measured = float(np.mean([row["metrics"]["lowest_valid_loss"] for row in runs]))
        gap = one["metrics"]["predicted"] - measured
        found |= {"measured": measured, "seeds": len(runs), "first": min(row["time"] for row in runs)}
        found |= {"error": gap, "relative_error": gap / measured}
    return found


def report(work: Work) -> list[str]:
    """Return lines that say what is predicted, what was measured, and the error."""
    found = outcome(record.latest(work_rows(work)), work.grid.name)
    if found["prediction"] is None:
        return ["no prediction is recorded yet"]
    one, m = found["prediction"], found["prediction"]["metrics"]
    lines = [
        f"law: {m['floor']:.4f} + {m['factor']:.4g} N^-{m['exponent']:.4f}, residual {m['residual']:.4f}",
        f"{one['own_params']['of']} at {one['own_params']['size']:,} non-embedding parameters: "
        f"predicted {m['predicted']:.4f} nats ({one['params_hash']}, {one['time']})",
    ]
    if found["measured"] is None:
        return [*lines, "not measured yet"]
    said = f"measured {found['measured']:.4f} over {found['seeds']} seed(s): "
    return [*lines, f"{said}error {found['error']:+.4f} nats, {found['relative_error']:+.2%}"]


def work_rows(work: Work) -> list[dict[str, Any]]:
    """Return the learning curves and predictions of a grid."""
    return [*work.rows("learning_curve"), *work.rows("prediction")]


def main(argv: list[str] | None = None) -> int:
    """Predict, or compare the prediction with what came."""
    parser = Parser(prog="python -m reclib.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("predict", "report"))
    parser.add_argument("name", help="an experiment file of params/grids, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--early", action="store_true", help="predict though seeds are missing")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        grid = read(given.name)
        config = changed(grid.data, dataset=given.dataset) if given.dataset else grid.data
        work = Work(grid, prepare(config), resolve(given.gpu))
        if given.action == "predict":
            predict(work, given.early)
        print("\n".join(report(work)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
