"""Instance-wise LoRA against plain LoRA and full fine-tuning: a step's time, and the memory it adds.

    python benchmarks/ilora.py                some minutes
    python benchmarks/ilora.py --quick        two to six pairs of eager steps, no memory: less than a minute
    python benchmarks/ilora.py --tiny         a model of no interest, to try the script

The shape is `electronics` of `engine.py` (160,000 items, hidden 256, 4 layers, batch 128, untied tables),
fp32, after some steps of full training as the base. Adapters: all encoder matrices, rank 8, 4 experts, gate
on the mean of the visible items' embeddings, its time included. Steps are timed in turns in one process, on
the same batches, and a ratio is the geometric mean over pairs of steps with its 95 % bootstrap interval. Peak
memory is taken in a process for each variant, beyond what is resident once the base is loaded.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Row, Rows, middle, options, resident_bytes, run_child, start
from engine import configs, dataset_of, whole_histories

from reclib import hardware
from reclib.config import ENCODER, AdapterConfig, changed, model_config
from reclib.data.prepare import synthetic_dataset
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, frozen_twin
from reclib.train import timing
from reclib.train.saving import load_weights, save_weights
from reclib.train.trainer import Trainer

ADAPTER = AdapterConfig(rank=8, num_experts=4, alpha=8.0, targets=ENCODER)
KINDS = ("full", "lora", "ilora")
WARMUP = 12  # steps that are not counted: compiled variants meet their shapes
PAIRS = {  # name of a ratio: above, below
    "ilora_over_lora_step": ("ilora", "lora"),
    "ilora_over_full_step": ("ilora", "full"),
    "lora_over_full_step": ("lora", "full"),
    "ilora_compiled_over_eager": ("ilora, compiled", "ilora"),
    "lora_compiled_over_eager": ("lora, compiled", "lora"),
    "ilora_over_lora_step_compiled": ("ilora, compiled", "lora, compiled"),
}


@functools.cache
def setting(tiny: bool) -> tuple[Any, Any, Any]:
    """Return histories and the configurations of model and training, whose schedule ends after all pairs."""
    if tiny:
        dataset = synthetic_dataset(300, 200, 9.4, 0)
        model = model_config("nano", num_items=dataset.num_items, max_len=50)
        train = changed(configs("ml", 1)[1], batch_size=32)
    else:
        dataset = dataset_of("electronics")
        model, train = configs("electronics", dataset.num_items)
    return dataset, model, changed(train, epochs=10_000, learning_rate=1e-4)


def trainer_of(model: Any, tiny: bool, **changes: Any) -> Trainer:
    dataset, _, train = setting(tiny)
    train = changed(train, **changes)
    return Trainer(model, whole_histories(dataset), train, hardware.resolve("cpu"), dataset.fingerprint)


def train_base(given: argparse.Namespace, folder: Path) -> None:
    """Train the base in full for some steps and write it."""
    torch.manual_seed(0)
    model = Bert4Rec(setting(given.tiny)[1])
    trainer = trainer_of(model, given.tiny, max_steps=given.base_steps, learning_rate=1e-3)
    for _ in trainer.steps():
        pass
    save_weights(model, folder, {})


def variant(base: Bert4Rec, kind: str, tiny: bool) -> Trainer:
    """Return a trainer of the base in full, or of an adapter on it, by its kind, maybe with ", compiled"."""
    kind, _, compiled = kind.partition(", ")
    model: Any = base
    if kind != "full":  # adapters share the base's tensors
        model = AdaptedModel(frozen_twin(base))
        torch.manual_seed(0)
        model.add(kind, changed(ADAPTER, kind=kind))
    return trainer_of(model, tiny, compile_mode="default" if compiled else "off")


def time_steps(given: argparse.Namespace, folder: Path, rows: Rows) -> Row:
    """Time the steps of all variants in turns; write a row for each and for each ratio."""
    frozen = load_weights(folder)
    trained = copy.deepcopy(frozen).requires_grad_(True)
    names = list(KINDS)
    if not given.quick and hardware.has_compiler():
        names += ["lora, compiled", "ilora, compiled"]
    trainers = {name: variant(trained if name == "full" else frozen, name, given.tiny) for name in names}
    warmup, pairs = WARMUP, given.pairs
    if given.quick:  # as many pairs as half a minute holds, two at least
        first = timing.interleave(trainers, 1, 1, 0)
        seconds = sum(measurement.warmup_seconds for measurement in first.values())
        warmup, pairs = 0, max(2, min(6, int(30 / seconds)))
    measured = timing.interleave(trainers, 1, warmup, pairs)
    result: Row = {"pairs": pairs}
    for name, measurement in measured.items():
        count = sum(p.numel() for p in trainers[name].parameters)
        about = {"status": measurement.status, "reason": measurement.reason, "trained": count}
        rows.add(name, **about, **measurement.timings(), losses=measurement.losses[-1:])
        if measurement.status == "ok":
            result[f"{name.replace(', ', '_')}_step_seconds"] = measurement.median_seconds
    for key, sides in PAIRS.items():
        if all(name in measured and measured[name].status == "ok" for name in sides):
            mean, low, high = timing.paired_ratio(*(measured[name] for name in sides))
            rows.add(key, ratio=mean, low=low, high=high)
            result |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return result


def child(kind: str, base: str, tiny: bool, threads: int) -> Row:
    """Return the peak of a few steps beyond what is resident when the base is loaded."""
    torch.set_num_threads(threads)
    model = load_weights(Path(base)).requires_grad_(True)
    setting(tiny)
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    loaded, cpu = resident_bytes(), torch.device("cpu")
    hardware.reset_peak_memory(cpu)
    trainer = variant(model, kind, tiny)
    timing.measure(trainer, 3, 2)
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {"added_bytes": hardware.peak_memory_bytes(cpu) - loaded, "weight_bytes": weights}


def measure_memory(given: argparse.Namespace, folder: Path, rows: Rows) -> Row:
    """Measure each kind in turns; return the bytes that each adds, and iLoRA's over full fine-tuning's."""
    call = {"base": str(folder), "tiny": given.tiny, "threads": given.threads}
    actions = {kind: functools.partial(run_child, __file__, call | {"kind": kind}) for kind in KINDS}
    results = rows.in_turns(actions, given.rounds, what="memory")
    added = {kind: middle(of_kind, "added_bytes") for kind, of_kind in results.items()}
    whole = {f"{kind}_added_bytes": value for kind, value in added.items()}
    return whole | {"added_memory_over_full": added["ilora"] / added["full"]}


def run(given: argparse.Namespace, rows: Rows) -> Row:
    torch.set_num_threads(given.threads)
    if given.quick:
        given.base_steps = 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "base"
        train_base(given, folder)
        result: Row = {"tiny": given.tiny}
        result |= {} if given.quick else measure_memory(given, folder, rows)
        return result | (rows.section("steps", lambda: time_steps(given, folder, rows)) or {})


if __name__ == "__main__":
    arguments = options(__doc__, rounds=3, quick="two to six pairs of eager steps, no memory")
    arguments.add_argument("--tiny", action="store_true", help="a model of no interest, to try the script")
    arguments.add_argument("--pairs", type=int, default=40)
    arguments.add_argument("--base-steps", type=int, default=60, help="of full training first")
    raise SystemExit(start(arguments, run, child))
