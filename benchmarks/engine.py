"""The training engine against the seed study's step, rung by rung, and against other libraries.

    python benchmarks/engine.py                    all, some minutes
    python benchmarks/engine.py --quick            few steps, one round
    python benchmarks/engine.py --peers .peers     other libraries too (see benchmarks/peers/README.md)

Every variant runs in a process of its own, because peak memory and the allocator's settings belong to a
process; rounds go A B C A B C. Each is a row; one that the system kills is a row with that reason. The last
line is one JSON object.

Shapes: `electronics` is 160,000 items, mean length 9.4, max_len 50, hidden 256, 4 layers, batch 128,
untied tables; `ml` is MovieLens 100K, hidden 64, 2 layers, max_len 200, batch 64. Full softmax, mask
probability 0.2, dropout 0.1, fp32, cloze targets drawn anew for each step.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    BEST_ALLOCATOR,
    ROOT,
    Row,
    Rows,
    clean_environment,
    middle,
    options,
    resident_bytes,
    run_child,
    run_process,
    start,
)

FLOOR = 16  # bytes per parameter of fp32 AdamW: weight, gradient, two moments
DEFAULTS, BEST, OURS, COMPILED = "seed, glibc defaults", "seed, best allocator", "ours", "compiled"
PEERS = {"rectools": ["full"], "replay": ["full", "restricted"]}
SCRIPTS = ROOT / "benchmarks" / "peers"
STEPS = {"electronics": 8, "ml": 60}  # timed, of a variant in a round
HUGE = ("seed", "rung 1", "rung 2")  # logits of every position: at glibc's defaults where not said otherwise


def dataset_of(shape: str) -> Any:
    """Return the histories of a shape."""
    from reclib.config import DataConfig
    from reclib.data.prepare import prepare, synthetic_dataset

    return synthetic_dataset(20_000, 160_000, 9.4, 0) if shape == "electronics" else prepare(DataConfig())


def configs(shape: str, num_items: int) -> tuple[Any, Any]:
    """Return the configurations of a shape's model and training."""
    from reclib.config import TrainConfig, model_config

    common = {"num_items": num_items, "dropout": 0.1}
    if shape == "electronics":
        model = model_config("85m", norm="pre", embedding_norm=False, **common)
        return model, TrainConfig(batch_size=128, mask_prob=0.2, last_item_share=0.0)
    return model_config("tiny", **common), TrainConfig(batch_size=64, mask_prob=0.2, last_item_share=0.0)


def whole_histories(dataset: Any) -> Any:
    """Return every history with its last items: timing holds nothing out."""
    from reclib.data.dataset import Histories

    return Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])


# -- one variant, in a process of its own --------------------------------------------------------------------


def child(name: str, shape: str, threads: int, steps: int, warmup: int, evaluate: bool = False) -> Row:
    """Time one variant, or measure the bound."""
    import torch

    from reclib import hardware

    torch.set_num_threads(threads)
    if name.startswith(HUGE):
        hardware.keep_freed_memory = lambda: False  # kept, buffers of gigabytes fragment the heap
    dataset = dataset_of(shape)
    return (
        bound_of(shape, dataset, steps)
        if name == "bound"
        else variant(name, shape, dataset, steps, warmup, evaluate)
    )


def variant(name: str, shape: str, dataset: Any, timed: int, warmup: int, evaluate: bool) -> Row:
    """Time the steps of a rung of the ladder, by its number, or of ours; return what it took and held."""
    import torch

    from reclib import hardware
    from reclib.config import changed
    from reclib.data.dataset import evaluation
    from reclib.experiments import speed
    from reclib.model.bert4rec import Bert4Rec
    from reclib.train import timing
    from reclib.train.fit import rank_targets
    from reclib.train.trainer import Trainer

    histories, rungs = whole_histories(dataset), speed.ladder(*configs(shape, dataset.num_items))
    number = 0 if name in (DEFAULTS, BEST) else int(name[5:]) if name.startswith("rung") else len(rungs) - 1
    rung = rungs[number]
    train = changed(rung.train, compile_mode="default") if name == COMPILED else rung.train
    device = hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    hardware.reset_peak_memory(device.torch_device)
    before = resident_bytes()
    torch.manual_seed(0)
    trainer = Trainer(Bert4Rec(rung.model), histories, train, device, dataset.fingerprint)
    measured = timing.measure(trainer, timed, warmup)
    if measured.status != "ok":
        return {"rung": rung.name, "status": measured.status, "reason": measured.reason}
    row = {
        "rung": rung.name,
        "reason": trainer.compile_reason,
        "sequences_per_step": measured.sequences / len(measured.step_seconds),
        "losses": measured.losses[-3:],
        "grown_bytes": (measured.peak_memory_bytes or 0) - before,
        "floor_bytes": FLOOR * sum(p.numel() for p in trainer.parameters),
    } | measured.timings()
    if evaluate:
        part = evaluation(dataset, "test")
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            rank_targets(trainer, part, True, 10)
            row["users_per_second"] = len(part.targets) / (time.perf_counter() - began)
    return row


def bound_of(shape: str, dataset: Any, repeats: int) -> Row:
    """Measure the bound at the typical one of several batches, so that it stands for the mean step."""
    import bound
    import torch

    from reclib import hardware
    from reclib.data.batches import Epoch

    hardware.keep_freed_memory()
    model, train = configs(shape, dataset.num_items)
    plan = Epoch(whole_histories(dataset), model, train, 0)
    batches = sorted((plan.step(i)[0] for i in range(min(plan.num_steps, 12))), key=lambda b: b.num_targets)
    least = bound.gemm_bound(model, batches[len(batches) // 2], torch.device("cpu"), repeats=max(3, repeats))
    parts = {part.name: part.seconds for part in least.components}
    return {"step_seconds": least.seconds, "gemm_seconds": least.gemm_seconds, "parts": parts}


# -- all of them ---------------------------------------------------------------------------------------------


def rounds_of(shape: str, given: argparse.Namespace, rows: Rows) -> dict[str, list[Row]]:
    """Run every variant and the bound in turns; return the rows of each."""
    from reclib.experiments.speed import CHANGES

    names = [DEFAULTS, BEST, *(f"rung {n}" for n in range(1, len(CHANGES))), OURS]
    names += [COMPILED] if shape == "ml" else []
    actions = {}
    for name in [*names, "bound"]:
        slow = shape == "electronics" and name.startswith(HUGE)
        steps = 2 if given.quick or slow else STEPS[shape]
        call = {"name": name, "shape": shape, "threads": given.threads, "steps": steps}
        call |= {"warmup": 1 if slow else 3 if given.quick else 5}
        call |= {"evaluate": shape == "ml" and name == OURS}
        environment = clean_environment(given.threads) | (BEST_ALLOCATOR if name == BEST else {})
        actions[name] = functools.partial(run_child, __file__, call, environment)
    return rows.in_turns(actions, given.rounds, shape=shape)


def figures(results: dict[str, list[Row]]) -> Row:
    """Return the ratios that follow, NaN where a variant failed."""
    step = {name: middle(rows, "step_seconds") for name, rows in results.items()}
    ours, own = results[OURS], step[OURS]
    seeds = [row["grown_bytes"] for row in results[DEFAULTS]]
    peaks = [row["grown_bytes"] / row["floor_bytes"] for row in ours]
    result = {
        "sequences_per_second": middle(ours, "sequences_per_step") / own,
        "step_seconds": own,
        "bound_seconds": step["bound"],
        "step_over_bound": own / step["bound"],
        "gemm_bound_share": middle(results["bound"], "gemm_seconds") / own,
        "seed_step_seconds": step[DEFAULTS],
        "seed_step_best_allocator_seconds": step[BEST],
        "seed_peak_bytes": max(seeds, default=None),
        "speedup_over_seed_step": step[DEFAULTS] / own,
        "speedup_over_seed_step_best_allocator": step[BEST] / own,
        "speedup_same_objective": step["rung 2"] / own,
        "peak_memory_over_floor": max(peaks, default=None),
    }
    if COMPILED in results:
        result["compile_speedup"] = own / step[COMPILED]
        result["compile_seconds"] = middle(results[COMPILED], "compile_seconds")
        result["users_per_second"] = middle(ours, "users_per_second")
    return result


def peers(shape: str, given: argparse.Namespace, rows: Rows) -> list[Row]:
    """Time the other libraries on the same sequences, at both allocator settings; return rows of both."""
    import numpy as np

    dataset, steps = dataset_of(shape), 2 if given.quick or shape == "electronics" else 15
    results = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, items=dataset.items, offsets=dataset.offsets, num_items=dataset.num_items)
        for peer, loss in ((peer, loss) for peer, losses in PEERS.items() for loss in losses):
            command = [
                given.peers.absolute() / peer / "bin/python",
                ROOT / f"benchmarks/peers/{peer}_peer.py",
            ]
            command += ["--shape", shape, "--data", file, "--loss", loss, "--threads", given.threads]
            command += ["--steps", steps, "--warmup", 2, *(["--eval"] if shape == "ml" else [])]
            for allocator, variables in (("glibc defaults", {}), ("best", BEST_ALLOCATOR)):
                run = functools.partial(run_process, command, clean_environment(given.threads) | variables)
                about = {"peer": f"{peer} {loss}", "allocator": allocator, "shape": shape}
                results.append(rows.attempt(f"{peer} {loss}, {allocator}", run, **about))
    return [row for row in results if row is not None]


def against(peer_rows: list[Row], ours: Row) -> Row:
    """Return our rates over those of the fastest peer."""
    if not peer_rows:
        return {}
    fastest = max(peer_rows, key=lambda row: row["sequences_per_second"])
    users = max(row.get("eval_users_per_second") or 0.0 for row in peer_rows)
    result = {
        "fastest_peer": fastest["name"],
        "speedup_over_fastest_peer": ours["sequences_per_second"] / fastest["sequences_per_second"],
    }
    if users and "users_per_second" in ours:
        result["users_speedup_over_fastest_peer"] = ours["users_per_second"] / users
    return result


def run(given: argparse.Namespace, rows: Rows) -> Row:
    """Run all shapes; return their figures, those of `ml` with a prefix."""
    given.rounds = 1 if given.quick else given.rounds
    result: Row = {}
    for shape in given.shapes:
        results = rounds_of(shape, given, rows)
        numbers = figures(results)
        if given.peers:
            numbers |= against(peers(shape, given, rows), numbers)
        result |= {f"{'ml_' if shape == 'ml' else ''}{key}": value for key, value in numbers.items()}
    return result


if __name__ == "__main__":
    arguments = options(__doc__, rounds=2)
    arguments.add_argument("--peers", type=Path, help="folder with the peers' environments")
    arguments.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    raise SystemExit(start(arguments, run, child))
