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

import argparse
import functools
import os
import tempfile
from pathlib import Path

import bound
import numpy as np
import torch
from common import BEST_ALLOCATOR, Row, Rows, middle, options, resident_bytes, run_child, run_process, start

from reclib import hardware
from reclib.config import DataConfig, ModelConfig, TrainConfig, model_config
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Histories
from reclib.data.prepare import prepare, synthetic_dataset
from reclib.experiments import speed
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.trainer import Trainer

FLOOR = 16  # bytes per parameter of fp32 AdamW: weight, gradient, two moments
DEFAULTS, BEST, OURS = "seed, glibc defaults", "seed, best allocator", "ours"
# With their losses. RecTools holds the logits of every position: 4 GB, and their gradient, at `electronics`.
PEERS = {
    "electronics": (("replay", "full"), ("replay", "restricted")),
    "ml": (("rectools", "full"), ("replay", "full"), ("replay", "restricted")),
}
STEPS = {"electronics": 8, "ml": 60}  # timed, of a variant in a round
HUGE = ("seed", "rung 1", "rung 2")  # logits of every position: at glibc's defaults where not said otherwise


def dataset_of(shape: str) -> Dataset:
    """Return the histories of a shape."""
    return synthetic_dataset(20_000, 160_000, 9.4, 0) if shape == "electronics" else prepare(DataConfig())


def configs(shape: str, num_items: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a shape's model and training."""
    size, batch_size, changes = "tiny", 64, {}
    if shape == "electronics":
        size, batch_size, changes = "85m", 128, {"norm": "pre", "embedding_norm": False}
    model = model_config(size, num_items=num_items, dropout=0.1, **changes)
    return model, TrainConfig(batch_size=batch_size, mask_prob=0.2, last_item_share=0.0)


def whole_histories(dataset: Dataset) -> Histories:
    """Return every history with its last items: timing holds nothing out."""
    return Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])


# -- one variant, in a process of its own --------------------------------------------------------------------


def child(name: str, shape: str, threads: int, steps: int, warmup: int) -> Row:
    """Time one variant, or measure the bound."""
    torch.set_num_threads(threads)
    if name.startswith(HUGE):
        hardware.keep_freed_memory = lambda: False  # kept, buffers of gigabytes fragment the heap
    dataset = dataset_of(shape)
    if name == "bound":
        return bound_of(shape, dataset, steps)
    return variant(name, shape, dataset, steps, warmup)


def variant(name: str, shape: str, dataset: Dataset, steps: int, warmup: int) -> Row:
    """Time the steps of a rung of the ladder, by its number, or of ours; return what it took and held."""
    rungs = speed.ladder(*configs(shape, dataset.num_items))
    number = 0 if name in (DEFAULTS, BEST) else -1 if name == OURS else int(name.removeprefix("rung "))
    rung, device = rungs[number], hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    hardware.reset_peak_memory(device.torch_device)
    before = resident_bytes()
    torch.manual_seed(0)
    histories = whole_histories(dataset)
    trainer = Trainer(Bert4Rec(rung.model), histories, rung.train, device, dataset.fingerprint)
    measured = timing.measure(trainer, steps, warmup)
    if measured.status != "ok":
        return {"rung": rung.name, "status": measured.status, "reason": measured.reason}
    return {
        "rung": rung.name,
        "sequences_per_step": measured.sequences / len(measured.step_seconds),
        "losses": measured.losses[-3:],
        "grown_bytes": (measured.peak_memory_bytes or 0) - before,
        "floor_bytes": FLOOR * sum(p.numel() for p in trainer.parameters),
    } | measured.timings()


def bound_of(shape: str, dataset: Dataset, repeats: int) -> Row:
    """Measure the bound at the typical one of several batches, so that it stands for the mean step."""
    hardware.keep_freed_memory()
    model, train = configs(shape, dataset.num_items)
    plan = Epoch(whole_histories(dataset), model, train, 0)
    batches = sorted((plan.step(i)[0] for i in range(min(plan.num_steps, 12))), key=lambda b: b.num_targets)
    typical = batches[len(batches) // 2]
    products, rest = bound.gemm_bound(model, typical, torch.device("cpu"), repeats=max(3, repeats))
    parts, gemm_seconds = products | rest, sum(products.values())
    return {"step_seconds": sum(parts.values()), "gemm_seconds": gemm_seconds, "parts": parts}


# -- all of them ---------------------------------------------------------------------------------------------


def clean_environment(threads: int) -> dict[str, str]:
    """Return this process's environment with a thread count and the allocator's defaults."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    return variables | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def rounds_of(shape: str, args: argparse.Namespace, rows: Rows) -> dict[str, list[Row]]:
    """Run every variant and the bound in turns; return the rows of each."""
    names = [DEFAULTS, BEST, *(f"rung {n}" for n in range(1, len(speed.CHANGES))), OURS]
    actions = {}
    for name in [*names, "bound"]:
        slow = shape == "electronics" and name.startswith(HUGE)
        call = {"name": name, "shape": shape, "threads": args.threads}
        call |= {"steps": 2 if args.quick or slow else STEPS[shape]}
        call |= {"warmup": 1 if slow else 3 if args.quick else 5}
        environment = clean_environment(args.threads) | (BEST_ALLOCATOR if name == BEST else {})
        actions[name] = functools.partial(run_child, __file__, call, environment)
    return rows.in_turns(actions, 1 if args.quick else args.rounds, shape=shape)


def ratios(results: dict[str, list[Row]]) -> Row:
    """Return our rates and the ratios that follow, NaN where a variant failed."""
    step = {name: middle(rows, "step_seconds") for name, rows in results.items()}
    ours, our_step = results[OURS], step[OURS]
    return {
        "sequences_per_second": middle(ours, "sequences_per_step") / our_step,
        "step_seconds": our_step,
        "bound_seconds": step["bound"],
        "step_over_bound": our_step / step["bound"],
        "gemm_bound_share": middle(results["bound"], "gemm_seconds") / our_step,
        "seed_step_seconds": step[DEFAULTS],
        "seed_step_best_allocator_seconds": step[BEST],
        "seed_peak_bytes": max((row["grown_bytes"] for row in results[DEFAULTS]), default=None),
        "speedup_over_seed_step": step[DEFAULTS] / our_step,
        "speedup_over_seed_step_best_allocator": step[BEST] / our_step,
        "speedup_same_objective": step["rung 2"] / our_step,
        "peak_memory_over_floor": max((r["grown_bytes"] / r["floor_bytes"] for r in ours), default=None),
    }


def peers(shape: str, args: argparse.Namespace, rows: Rows) -> list[Row]:
    """Time the other libraries on the same sequences, at both allocator settings; return their rows."""
    dataset, steps = dataset_of(shape), 2 if args.quick or shape == "electronics" else 15
    results = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, items=dataset.items, offsets=dataset.offsets, num_items=dataset.num_items)
        for peer, loss in PEERS[shape]:
            script = Path(__file__).resolve().parent / f"peers/{peer}_peer.py"
            command = [args.peers.absolute() / peer / "bin/python", script]
            command += ["--shape", shape, "--data", file, "--loss", loss, "--threads", args.threads]
            command += ["--steps", steps, "--warmup", 2]
            for allocator, variables in (("glibc defaults", {}), ("best", BEST_ALLOCATOR)):
                run = functools.partial(run_process, command, clean_environment(args.threads) | variables)
                about = {"peer": f"{peer} {loss}", "allocator": allocator, "shape": shape}
                results.append(rows.attempt(f"{peer} {loss}, {allocator}", run, **about))
    return [row for row in results if row is not None]


def over_fastest(peer_rows: list[Row], ours: Row) -> Row:
    """Return our rates over those of the fastest peer."""
    if not peer_rows:
        return {}
    fastest = max(peer_rows, key=lambda row: row["sequences_per_second"])
    ratio = ours["sequences_per_second"] / fastest["sequences_per_second"]
    return {"fastest_peer": fastest["name"], "speedup_over_fastest_peer": ratio}


def run(args: argparse.Namespace, rows: Rows) -> Row:
    """Run all shapes; return their rates and ratios, those of `ml` with a prefix."""
    result: Row = {}
    for shape in args.shapes:
        numbers = ratios(rounds_of(shape, args, rows))
        if args.peers:
            numbers |= over_fastest(peers(shape, args, rows), numbers)
        result |= {f"{'ml_' if shape == 'ml' else ''}{key}": value for key, value in numbers.items()}
    return result


if __name__ == "__main__":
    parser = options(__doc__, quick="few steps, one round", rounds=2, threads=2)
    parser.add_argument("--peers", type=Path, help="folder with the peers' environments")
    parser.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    raise SystemExit(start(parser, run, child))
