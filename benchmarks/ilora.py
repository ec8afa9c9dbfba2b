"""Instance-wise LoRA against plain LoRA and full fine-tuning: a step's time, and the memory it adds.

    python benchmarks/ilora.py                some minutes
    python benchmarks/ilora.py --tiny         a model of no interest and few steps, to try the script

The shape is `electronics` of `engine.py` (160,000 items, hidden 256, 4 layers, batch 128, untied tables),
fp32, after some steps of full training as the base. Adapters: all encoder matrices, rank 8, 4 experts, gate
on the mean of the visible items' embeddings, its time included. Steps are timed in turns in one process, on
the same batches, and a ratio is the geometric mean over pairs of steps with its 95 % bootstrap interval. Peak
memory is taken in a process for each variant, beyond what is resident once its model is built.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Row, Rows, middle, options, resident_bytes, run_child, start
from engine import configs, dataset_of, whole_histories

from reclib import hardware, parameters
from reclib.config import ModelConfig, TrainConfig, changed, model_config
from reclib.data.dataset import Dataset
from reclib.data.prepare import synthetic_dataset
from reclib.experiments import speed
from reclib.experiments.adaptation import arm_model
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.saving import load_weights, save_weights
from reclib.train.trainer import Trainer

KINDS = ("full", "lora", "ilora")
BASE_STEPS = 60  # of full training first


def setting(tiny: bool) -> tuple[Dataset, ModelConfig, TrainConfig]:
    """Return histories and the configurations of model and training."""
    dataset = synthetic_dataset(300, 200, 9.4, 0) if tiny else dataset_of("electronics")
    model, train = configs("electronics", dataset.num_items)
    if tiny:
        model, train = model_config("nano", num_items=200, max_len=50), changed(train, batch_size=32)
    return dataset, model, train


def parameters_of(train: TrainConfig, tiny: bool, pairs: int = 2) -> Any:
    """Return parameters of notebook 05 for these steps: compiled ones too, where there is a compiler."""
    modes = ["off", "default"] if hardware.has_compiler() and not tiny else ["off"]
    values = parameters.profile("05_ilora", "smoke") | {"arms": ["none", *KINDS], "learning_rates": [1e-4]}
    values |= {name: getattr(train, name) for name in ("batch_size", "mask_prob", "last_item_share")}
    values |= {"rank": 8, "alpha": 8.0, "num_experts": 4, "representation": "mean_embedding"}
    values |= {"precisions": ["fp32"], "compile_modes": modes, "rounds": pairs, "warmup_steps": 12}
    return parameters.build("05_ilora", values)


def train_base(tiny: bool, folder: Path) -> None:
    """Train the base in full for some steps and write it."""
    dataset, model, train = setting(tiny)
    torch.manual_seed(0)
    base, train = Bert4Rec(model), changed(train, max_steps=2 if tiny else BASE_STEPS)
    for _ in Trainer(base, whole_histories(dataset), train, hardware.resolve("cpu"), "base").steps():
        pass
    save_weights(base, folder, {})


def time_steps(args: argparse.Namespace, folder: Path, rows: Rows) -> Row:
    """Time the steps of all variants in turns; return their seconds and ratios."""
    dataset, _, train = setting(args.tiny)
    p = parameters_of(train, args.tiny, args.pairs)
    result: Row = {"pairs": p.rounds}
    for step in speed.adapter_grid(p, load_weights(folder), dataset, hardware.resolve("cpu")):
        name = step.asked["model"] + ("" if step.asked["compile_mode"] == "off" else "_compiled")
        rows.add(name, **step.own_params(), **step.metrics(), **step.timings)
        result[f"{name}_step_seconds"] = step.timings.get("step_seconds")
        result |= {f"{name}_{key}": ratio for key, ratio in step.timings.items() if key.startswith("over_")}
    return result


def child(kind: str, base: str, tiny: bool, threads: int) -> Row:
    """Return the peak of a few steps beyond what is resident when the model is built."""
    torch.set_num_threads(threads)
    dataset, _, train = setting(tiny)
    model = arm_model(parameters_of(train, tiny), kind, load_weights(Path(base)), 0)
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    built, device = resident_bytes(), hardware.resolve("cpu")
    hardware.reset_peak_memory(device.torch_device)
    timing.measure(Trainer(model, whole_histories(dataset), train, device, "memory"), 3, 2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "added_bytes": hardware.peak_memory_bytes(device.torch_device) - built,
        "weight_bytes": weights,
    }


def measure_memory(args: argparse.Namespace, folder: Path, rows: Rows) -> Row:
    """Measure each kind in turns; return the bytes that each adds, and iLoRA's over full fine-tuning's."""
    call = {"base": str(folder), "tiny": args.tiny, "threads": args.threads}
    actions = {kind: functools.partial(run_child, __file__, call | {"kind": kind}) for kind in KINDS}
    results = rows.in_turns(actions, args.rounds, what="memory")
    added = {f"{kind}_added_bytes": middle(of_kind, "added_bytes") for kind, of_kind in results.items()}
    return added | {"added_memory_over_full": added["ilora_added_bytes"] / added["full_added_bytes"]}


def run(args: argparse.Namespace, rows: Rows) -> Row:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        train_base(args.tiny, folder)
        memory = measure_memory(args, folder, rows)
        return memory | (rows.section("steps", lambda: time_steps(args, folder, rows)) or {})


if __name__ == "__main__":
    parser = options(__doc__, rounds=3, threads=2, pairs=40)
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to try the script")
    raise SystemExit(start(parser, run, child))
