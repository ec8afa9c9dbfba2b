"""The training engine against the seed study's step, rung by rung, and against other libraries.

    python benchmarks/engine.py                    all, some minutes
    python benchmarks/engine.py --quick            few steps, one round
    python benchmarks/engine.py --peers .peers     other libraries too (see benchmarks/peers/README.md)

Every variant runs in a process of its own, because peak memory and the allocator's settings belong to a
process; rounds go A B C A B C. The last line is one JSON object.

Shapes: `electronics` is 160,000 items, mean length 9.4, max_len 50, hidden 256, 4 layers, batch 128,
untied tables; `ml` is MovieLens 100K, hidden 64, 2 layers, max_len 200, batch 64. Full softmax, mask
probability 0.2, dropout 0.1, fp32, cloze targets drawn anew for each step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLOOR = 16  # bytes per parameter of fp32 AdamW: weight, gradient, two moments
BEST_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
OURS = "ours"
PEERS = {"recbole": ["full"], "rectools": ["full"], "replay": ["full", "restricted"]}
STEPS = {"electronics": 8, "ml": 60}  # timed, of a variant in a round
HUGE = ("seed", "rung 1", "rung 2")  # logits of every position: at glibc's defaults where not said otherwise
SLOW_STEPS = 2  # of the variants whose step takes seconds


# -- one variant, in a process of its own --------------------------------------------------------------------


def dataset_of(shape: str) -> Any:
    from reclib.config import DataConfig
    from reclib.data.prepare import prepare, synthetic_dataset

    return synthetic_dataset(20_000, 160_000, 9.4, 0) if shape == "electronics" else prepare(DataConfig())


def configs(shape: str, num_items: int) -> tuple[Any, Any]:
    from reclib.config import TrainConfig, model_config

    if shape == "electronics":
        same = {"norm": "pre", "embedding_norm": False}
        model = model_config("85m", num_items=num_items, dropout=0.1, **same)
        return model, TrainConfig(batch_size=128, mask_prob=0.2, last_item_share=0.0)
    model = model_config("tiny", num_items=num_items, dropout=0.1)
    return model, TrainConfig(batch_size=64, mask_prob=0.2, last_item_share=0.0)


def variants(shape: str) -> list[str]:
    """Names of the variants: rungs of the ladder by number, the seed step at two allocator settings, ours."""
    from reclib.experiments.speed import CHANGES

    rungs = [f"rung {n}" for n in range(1, len(CHANGES))]
    return [
        "seed, glibc defaults",
        "seed, best allocator",
        *rungs,
        OURS,
        *(["compiled"] if shape == "ml" else []),
    ]


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say how much memory is resident")


def child(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from reclib import hardware
    from reclib.config import changed
    from reclib.data.batches import Epoch
    from reclib.data.prepare import Histories, evaluation
    from reclib.experiments import speed
    from reclib.model.bert4rec import Bert4Rec
    from reclib.train import timing
    from reclib.train.fit import rank_targets
    from reclib.train.trainer import Trainer

    torch.set_num_threads(given.threads)
    if given.child.startswith(HUGE):
        hardware.keep_freed_memory = lambda: False  # kept, buffers of gigabytes fragment the heap
    dataset = dataset_of(given.shape)
    histories = Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])
    model, train = configs(given.shape, dataset.num_items)
    rungs = speed.ladder(model, train)
    number = {"seed": 0, "rung": int(given.child[5:]) if given.child.startswith("rung") else 0}.get(
        given.child.split()[0].strip(","), len(rungs) - 1
    )
    rung = rungs[number]
    if given.child == "compiled":
        rung = speed.Rung(
            "compiled", "compile_mode=default", rung.model, changed(rung.train, compile_mode="default")
        )

    device = hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    hardware.reset_peak_memory(device.torch_device)
    before = resident_bytes()
    torch.manual_seed(0)
    trainer = Trainer(Bert4Rec(rung.model), histories, rung.train, device, dataset.fingerprint)
    found = timing.interleave({"": trainer}, given.steps, given.warmup, 1)[""]
    parameters = sum(p.numel() for p in trainer.parameters)
    plan = Epoch(histories, rung.model, rung.train, 0)
    began = time.perf_counter()
    steps = min(20, plan.num_steps)
    for step in range(steps):
        plan.step(step)
    result = {
        "name": rung.name,
        "change": rung.change,
        "status": found.status,
        "reason": found.reason or trainer.compile_reason,
        "parameters": parameters,
        "preparation_seconds": (time.perf_counter() - began) / steps,
        "timings": found.timings(),
        "step_seconds": found.step_seconds,
        "sequences_per_step": found.sequences / max(1, len(found.step_seconds)),
        "targets_per_sequence": found.targets / max(1, found.sequences),
        "fill": found.fill if found.row_tokens else None,
        "losses": found.losses,
        "grown_bytes": (found.peak_memory_bytes or 0) - before,
        "floor_bytes": FLOOR * parameters,
    }
    if given.evaluate:
        part = evaluation(dataset, "test")
        rank_targets(trainer, part, True, 10)
        began = time.perf_counter()
        rank_targets(trainer, part, True, 10)
        result["users_per_second"] = len(part.targets) / (time.perf_counter() - began)
    return result


def child_bound(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the bound over several batches' targets, so that it stands for the mean step."""
    import bound
    import torch

    from reclib import hardware
    from reclib.data.batches import Epoch
    from reclib.data.prepare import Histories

    torch.set_num_threads(given.threads)
    hardware.keep_freed_memory()
    dataset = dataset_of(given.shape)
    histories = Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])
    model, train = configs(given.shape, dataset.num_items)
    plan = Epoch(histories, model, train, 0)
    batches = [plan.step(i)[0] for i in range(min(plan.num_steps, 12))]
    typical = sorted(batches, key=lambda batch: batch.num_targets)[len(batches) // 2]
    found = bound.gemm_bound(model, typical, torch.device("cpu"), repeats=max(3, given.steps))
    parts = [{"name": c.name, "seconds": c.seconds, "rate": c.rate, "unit": c.unit} for c in found.components]
    return {"seconds": found.seconds, "gemm_seconds": found.gemm_seconds, "components": parts}


# -- the parent ----------------------------------------------------------------------------------------------


def run(
    name: str, shape: str, given: argparse.Namespace, steps: int, warmup: int, evaluate: bool
) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(given.threads), "MKL_NUM_THREADS": str(given.threads)}
    if name == "seed, best allocator":
        environment |= BEST_ALLOCATOR
    command = [sys.executable, __file__, "--child", name, "--shape", shape, "--threads", str(given.threads)]
    command += ["--steps", str(steps), "--warmup", str(warmup), *(["--evaluate"] if evaluate else [])]
    return last_line(command, environment)


def last_line(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode < 0:  # killed: there was not enough memory for it on this machine
        none: dict[str, Any] = {"status": "oom", "name": "killed for want of memory", "timings": {}}
        return none | {"step_seconds": [], "sequences_per_step": 0.0, "grown_bytes": 0, "floor_bytes": 1}
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def rounds(
    shape: str, given: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Run every variant and the bound in turns; return what each gave, round by round."""
    found: dict[str, list[dict[str, Any]]] = {}
    bounds = []
    for number in range(given.rounds):
        for name in variants(shape):
            slow = shape == "electronics" and name.startswith(HUGE)
            if slow and number and given.quick:
                continue
            steps = 2 if given.quick else SLOW_STEPS if slow else STEPS[shape]
            warmup = 1 if slow else 3 if given.quick else 5
            evaluate = shape == "ml" and name == OURS
            row = run(name, shape, given, steps, warmup, evaluate)
            found.setdefault(name, []).append(row)
            said = f"{row['timings']['step_seconds']:.4f} s" if row["status"] == "ok" else row["status"]
            print(f"  round {number + 1}  {shape:<12}{name:<24}{row['name']:<30}{said}", flush=True)
        bounds.append(run("bound", shape, given, 3 if given.quick else 5, 0, False))
    return found, bounds


def step_of(rows: list[dict[str, Any]]) -> float:
    """Return the median over rounds of the rounds' median steps; NaN where memory ran out."""
    known = [row["timings"]["step_seconds"] for row in rows if row["status"] == "ok"]
    return median(known) if known else float("nan")


def table(shape: str, found: dict[str, list[dict[str, Any]]], bounds: list[dict[str, Any]]) -> None:
    print(f"\n{shape}")
    print(
        f"{'variant':<24}{'rung':<30}{'step s':>9}{'spread':>16}{'seq/s':>8}{'x before':>9}{'peak/floor':>11}"
    )
    before = None
    for name, rows in found.items():
        step = step_of(rows)
        every = [x for row in rows for x in row["step_seconds"]]
        rate = fmean(row["sequences_per_step"] for row in rows) / step
        gain = f"{before / step:.2f}" if before else ""
        peak = max(row["grown_bytes"] / row["floor_bytes"] for row in rows)
        spread = f"{min(every):.3f}-{max(every):.3f}" if every else "out of memory"
        print(f"{name:<24}{rows[0]['name']:<30}{step:>9.4f}{spread:>16}{rate:>8.1f}{gain:>9}{peak:>11.2f}")
        before = step
    print(f"{'bound':<54}{median(b['seconds'] for b in bounds):>9.4f}")
    for part in bounds[-1]["components"]:
        rate = f"{part['rate'] / 1e9:.0f} G{part['unit']}" if part["rate"] else "measured"
        print(f"    {part['name']:<38}{part['seconds']:>9.4f} s   {rate}")


def figures(found: dict[str, list[dict[str, Any]]], bounds: list[dict[str, Any]]) -> dict[str, Any]:
    ours = found[OURS]
    step, masked = step_of(ours), step_of(found["rung 2"])
    best, defaults = step_of(found["seed, best allocator"]), step_of(found["seed, glibc defaults"])
    limit = median(b["seconds"] for b in bounds)
    return {
        "sequences_per_second": fmean(row["sequences_per_step"] for row in ours) / step,
        "step_seconds": step,
        "bound_seconds": limit,
        "step_over_bound": step / limit,
        "gemm_bound_share": median(b["gemm_seconds"] for b in bounds) / step,
        "seed_step_seconds": defaults,
        "seed_step_best_allocator_seconds": best,
        "seed_peak_bytes": max(row["grown_bytes"] for row in found["seed, glibc defaults"]),
        "speedup_over_seed_step": defaults / step,
        "speedup_over_seed_step_best_allocator": best / step,
        "speedup_same_objective": masked / step,
        "objective_factor": defaults / step_of(found["rung 1"]),
        "peak_memory_over_floor": max(row["grown_bytes"] / row["floor_bytes"] for row in ours),
        "batch_preparation_share": median(row["preparation_seconds"] for row in ours) / step,
        "batch_wait_share": median(row["timings"]["fetch_share"] for row in ours),
        "targets_per_sequence": fmean(row["targets_per_sequence"] for row in ours),
    }


def peers(shape: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the other libraries on the same sequences, each at both allocator settings; keep the faster."""
    import numpy as np

    dataset, rows = dataset_of(shape), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, items=dataset.items, offsets=dataset.offsets, num_items=dataset.num_items)
        for name, losses in PEERS.items():
            python = given.peers.absolute() / name / "bin/python"
            for loss in losses if python.exists() else []:
                script = ROOT / f"benchmarks/peers/{name}_peer.py"
                steps = 2 if given.quick or shape == "electronics" else 15
                command = [str(python), str(script), "--shape", shape, "--data", str(file), "--loss", loss]
                command += ["--threads", str(given.threads), "--steps", str(steps), "--warmup", "2"]
                command += ["--eval"] if shape == "ml" else []
                rows.append(best_setting(f"{name} {loss}", command))
    return rows


def best_setting(name: str, command: list[str]) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    both = [last_line(command, clean | setting) for setting in ({}, BEST_ALLOCATOR)]
    best = max(both, key=lambda row: row["sequences_per_second"])
    said = ", ".join(f"{row['sequences_per_second']:.1f}" for row in both)
    users = max(row.get("eval_users_per_second") or 0.0 for row in both)
    print(f"  {name:<22}{said} sequences/s (defaults, best allocator); {users:.0f} users/s", flush=True)
    return {
        "name": name,
        "sequences_per_second": best["sequences_per_second"],
        "sequences_per_second_glibc_defaults": both[0]["sequences_per_second"],
        "users_per_second": users,
        "peak_rss_bytes": both[0].get("peak_rss_bytes"),
    }


def against(rows: list[dict[str, Any]], ours: dict[str, Any], prefix: str) -> dict[str, Any]:
    if not rows:
        return {}
    fastest = max(rows, key=lambda row: row["sequences_per_second"])
    result: dict[str, Any] = {f"{prefix}fastest_peer": fastest["name"], f"{prefix}peers": rows}
    result[f"{prefix}speedup_over_fastest_peer"] = (
        ours[f"{prefix}sequences_per_second"] / fastest["sequences_per_second"]
    )
    users = max(row["users_per_second"] for row in rows)
    if users and f"{prefix}users_per_second" in ours:
        result[f"{prefix}users_speedup_over_fastest_peer"] = ours[f"{prefix}users_per_second"] / users
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two steps a variant, one round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder with the peers' environments")
    parser.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    for hidden in ("--child", "--shape"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--steps", "--warmup"):
        parser.add_argument(hidden, type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps((child_bound if given.child == "bound" else child)(given)))
        return
    given.rounds = 1 if given.quick else given.rounds
    result: dict[str, Any] = {"threads": given.threads, "quick": given.quick, "rounds": given.rounds}
    for shape in given.shapes:
        prefix = "ml_" if shape == "ml" else ""
        found, bounds = rounds(shape, given)
        table(shape, found, bounds)
        mine = figures(found, bounds)
        if shape == "ml":
            mine["compile_speedup"] = mine["step_seconds"] / step_of(found["compiled"])
            mine["compile_seconds"] = median(r["timings"]["compile_seconds"] for r in found["compiled"])
            mine["users_per_second"] = median(row["users_per_second"] for row in found[OURS])
        result |= {f"{prefix}{key}": value for key, value in mine.items()}
        if given.peers:
            result |= against(peers(shape, given), result, prefix)
    known = {k: None if isinstance(v, float) and v != v else v for k, v in result.items()}
    print(json.dumps(known))


if __name__ == "__main__":
    main()
