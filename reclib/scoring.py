"""Scores a grid's final arms on the test split, beside the baselines, and records all that follows from it.

    python -m reclib.scoring ml-1m
    python -m reclib.scoring ablations-ml-100k --validation    # all arms against the first; test unseen
    python -m reclib.scoring ml-1m --keep    # keep what the runs so far show on test, and show nothing of it
    python -m reclib.scoring ml-1m --from-ranks    # anew without weights: with new baselines, say

Nothing is chosen here: arms are final by the grid's file, epochs and the baselines' hyperparameters by
validation. Every call is counted in the records (`earlier`), and so are the configurations of a model family
that were scored before on the same data and split (`looks`), since a test split that is looked at often is a
validation split. A seed whose run another grid had among the candidates for a recipe has chosen that recipe:
it stays in the means, and is left out of the comparisons. What a run showed on the test split is kept beside
its validation ranks: a run that is trained later or elsewhere joins without the others' weights, and none
looks at the test split twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from reclib import assessment, grid, metrics, paths, record, statistics, tables
from reclib.assessment import Assessed, Conditions, Model, Result
from reclib.command import Parser, exit_code
from reclib.config import InputError, changed
from reclib.data import prepare
from reclib.fit import Options
from reclib.grid import Arm, Work
from reclib.hardware import resolve
from reclib.protocols import Outcome
from reclib.splits import Split, leave_one_out

SAMPLES = 2000  # bootstrap resamples of the users
MAIN_SPLIT = "leave_one_out"
# Names of arrays that files had before there were others; a protocol's own name is used for the rest.
NAMES = {assessment.MAIN: "test", assessment.KEPT: "test kept"}


def final_arms(work: Work) -> list[Arm]:
    """Return the arms to be scored; raise `InputError` where one of their runs is not trained yet."""
    final = [arm for arm in work.grid.arms if arm.final]
    missing = [f"{a.name} seed {s}" for a in final for s in a.seeds if not work.trained(a, s)]
    if missing or not final:
        said = f"not trained yet: {', '.join(missing)}" if missing else "it has no final arm"
        raise InputError(f"grid {work.grid.name!r} cannot be scored: {said}")
    return final


def assess_arm(work: Work, arm: Arm, test: Conditions) -> Model:
    """Return what an arm's runs showed on the test split; a run that has not been asked yet is."""
    return Model(arm.name, [assess_run(work, arm, seed, test) for seed in arm.seeds], list(arm.seeds))


def assess_run(work: Work, arm: Arm, seed: int, test: Conditions) -> Assessed:
    """Return what a run showed on the test split: from its file, or by ranking the targets now."""
    file = work.ranks_file(arm, seed)
    kept = dict(np.load(file)) if file.is_file() else {}
    if "test" in kept:
        return unpacked(kept)
    print(f"  {arm.name}, seed {seed}", flush=True)
    one = assessment.assess_trained(work.train(arm, seed, Options()), test)
    grid.save_ranks(file, kept | packed(one))
    return one


def keep(work: Work) -> list[str]:
    """Keep what the trained runs of the final arms show on the test split, before all of them are trained.

    For machines that go away, weights and all: nothing of it is shown or recorded until `score` has every
    run, so no choice can rest on it. Returns the runs that are kept.
    """
    test = assessment.draw(work.dataset, leave_one_out(work.dataset).test)
    final = [arm for arm in work.grid.arms if arm.final and arm.split == MAIN_SPLIT]
    trained = [(arm, seed) for arm in final for seed in arm.seeds if work.trained(arm, seed)]
    for arm, seed in trained:
        assess_run(work, arm, seed, test)
    return [f"{arm.name} seed {seed}" for arm, seed in trained]


def packed(one: Assessed) -> dict[str, np.ndarray]:
    """Return a run's assessment as named arrays; `unpacked` reads them."""
    arrays = {NAMES.get(name, f"test {name}"): outcome.ranks for name, outcome in one.outcomes.items()}
    labels = [[o.protocol, o.label, str(int(o.comparable))] for o in one.outcomes.values()]
    controls = {"test shuffled": one.shuffled, "test shuffled but last": one.shuffled_but_last}
    return arrays | controls | {"test top": one.top, "test protocols": np.array(labels)}


def unpacked(arrays: Mapping[str, np.ndarray]) -> Assessed:
    """Return the assessment that `packed` wrote; files of before it hold the ranks of two protocols alone."""
    both = [[assessment.MAIN, assessment.MAIN, "1"], [assessment.KEPT, assessment.KEPT, "1"]]
    outcomes = {}
    for name, label, comparable in arrays.get("test protocols", both):
        ranks = arrays[NAMES.get(name, f"test {name}")]
        outcomes[name] = Outcome(name, label, comparable == "1", ranks, np.arange(len(ranks)))
    nothing = np.zeros((0,), np.int64)
    controls = (arrays.get(f"test {name}", nothing) for name in ("shuffled", "shuffled but last", "top"))
    return Assessed(outcomes, *controls)


def score(work: Work, from_ranks: bool = False) -> list[Result]:
    """Score the final arms and the baselines under leave-one-out, and arms of other splits under theirs.

    `from_ranks` takes all of the first from the kept ranks and leaves the others as they are recorded.
    """
    final = final_arms(work)
    if from_ranks:
        final = [arm for arm in final if arm.split == MAIN_SPLIT]
        missing = [f"{a.name} seed {s}" for a in final for s in a.seeds if not _is_kept(work, a, s)]
        if missing:
            raise InputError(
                f"no ranks on the test split are kept of {', '.join(missing)}: leave --from-ranks"
            )
    split = leave_one_out(work.dataset)
    test = assessment.draw(work.dataset, split.test)
    models, chosen = assessment.assess_baselines(split, work.dataset, test)
    models += [assess_arm(work, arm, test) for arm in final if arm.split == MAIN_SPLIT]
    reference = next(arm.name for arm in final if arm.split == MAIN_SPLIT)
    out = choosing_seeds(work, final)
    if out:
        print("left out of the comparisons, since they chose the recipe:", out)
    found = _said_of(models, work, split, reference, out)
    for arm in final:
        if arm.split != MAIN_SPLIT:
            found += [one for seed in arm.seeds for one in _under_its_split(work, arm, seed)]
    keys = {f"{arm.name} seed {seed}": work.key(arm, seed) for arm in final for seed in arm.seeds}
    said: dict[str, Any] = {"runs": keys, "baselines": chosen, "bootstrap_samples": SAMPLES}
    said["arms"] = {arm.name: _said(work, arm) for arm in final}
    said |= {"looks": looks_before(work, final), "seeds_left_out": out}
    key = record.params_hash({"scored": keys, "data": work.dataset.fingerprint})
    for result in found:
        work.write(
            record.params_hash({"of": key, "own": result.params, "seed": result.seed}), result, said, {}
        )
    return found


def _is_kept(work: Work, arm: Arm, seed: int) -> bool:
    file = work.ranks_file(arm, seed)
    if not file.is_file():
        return False
    with np.load(file) as kept:
        return "test" in kept.files


def choosing_seeds(work: Work, arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Return, by arm, the seeds whose very run a recipe was chosen from, as the committed records have it.

    These are runs that a grid of trials, ablations or tuning has a learning curve of as well.
    """
    rows = [r for r in record.committed() if r["name"] == "learning_curve"]
    keys = {
        r["params_hash"]
        for r in rows
        if tables.chooses(r["data"]["name"]) and r["data"]["name"] != work.grid.name
    }
    found = {arm.name: [seed for seed in arm.seeds if work.key(arm, seed) in keys] for arm in arms}
    return {name: seeds for name, seeds in found.items() if seeds}


def looks_before(work: Work, arms: Sequence[Arm]) -> dict[str, int]:
    """Return, by family of the arms, how many of its configurations the records show on this test split."""
    counts = tables.looks(record.read(paths.root() / "executed"))
    families = {tables.family(asdict(work.configs(arm, arm.seeds[0])[0]), arm.name) for arm in arms}
    where = (work.dataset.fingerprint, "leave-one-out")
    return {family: counts.get((*where, family), 0) for family in sorted(families)}


def _said_of(
    models: Sequence[Model], work: Work, split: Split, reference: str, out: Mapping[str, Sequence[int]]
) -> list[Result]:
    """Return all results, or without protocols and controls where a run's file does not hold them."""
    partial = [m.name for m in models if not all(len(run.top) for run in m.runs)]
    if not partial:
        return assessment.everything(models, work.dataset, split.test, reference, SAMPLES, out)
    print(f"ranks alone are kept of {', '.join(partial)}: accuracy and comparisons only")
    return [
        *assessment.headline(models, SAMPLES),
        *assessment.comparisons(models, reference, out),
    ]


def validation_differences(work: Work) -> list[Result]:
    """Compare every arm with the first on validation: paired by user, corrected for the number of arms.

    The band of seeds is the range of this arm's means, each minus the base's mean over its seeds.
    """
    base = work.grid.arms[0]
    values = {}
    for arm in work.grid.arms:
        trained = [seed for seed in arm.seeds if work.trained(arm, seed)]
        if arm.split == base.split and trained:
            values[arm.name] = np.stack([_validation(work, arm, seed) for seed in trained])
    if base.name not in values:
        return []
    mean = float(values[base.name].mean())
    found = []
    for one in statistics.compare(values, base.name):
        result = assessment.compared(one, "ndcg@10", "validation_difference")
        low, high = (end - mean for end in one.seed_range)
        numbers = {"value": mean + one.difference.mean, "base": mean, "seed_low": low, "seed_high": high}
        found.append(result._replace(metrics=dict(result.metrics) | numbers))
    return found


def compare(work: Work) -> list[Result]:
    """Record the comparisons on validation of the arms that are trained."""
    found = validation_differences(work)
    for result in found:
        key = record.params_hash({"compared": result.params, "data": work.dataset.fingerprint})
        work.write(key, result, {}, {})
    return found


def _validation(work: Work, arm: Arm, seed: int) -> np.ndarray:
    with np.load(work.ranks_file(arm, seed)) as file:
        return metrics.ndcg(file["valid"], 10)


def _said(work: Work, arm: Arm) -> dict[str, Any]:
    model, train = work.configs(arm, arm.seeds[0])
    return {"model": asdict(model), "train": asdict(train), "split": arm.split, "seeds": list(arm.seeds)}


def _under_its_split(work: Work, arm: Arm, seed: int) -> list[Result]:
    trainer = work.train(arm, seed, Options())
    name = arm.name.split(" (")[0]  # "causal (global time)" is the causal model: the protocol says the rest
    return assessment.other_split(trainer, work.split(arm), SAMPLES, name, seed)


def main(argv: list[str] | None = None) -> int:
    """Score a grid and print its table."""
    parser = Parser(prog="python -m reclib.scoring", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="an experiment file of params/grids, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--validation", action="store_true", help="compare all arms with the first on validation, test unseen"
    )
    instead.add_argument(
        "--keep", action="store_true", help="only keep what the runs so far show on the test split, unseen"
    )
    instead.add_argument(
        "--from-ranks", action="store_true", help="score from the kept ranks: no weights, other splits left"
    )
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        chosen = grid.read(given.name)
        config = changed(chosen.data, dataset=given.dataset) if given.dataset else chosen.data
        work = Work(chosen, prepare(config), resolve(given.gpu))
        if given.keep:
            print("kept:", ", ".join(keep(work)) or "no run is trained yet")
            return 0
        found = compare(work) if given.validation else score(work, given.from_ranks)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for result in found:
        if result.name in ("test_metrics", "validation_difference"):
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            seed = "" if result.seed is None else f" seed {result.seed}"
            print(f"{result.params['model']}{seed}: {numbers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
