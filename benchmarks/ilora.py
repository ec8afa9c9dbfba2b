"""Instance-wise LoRA against plain LoRA and full fine-tuning: a step's time, and the memory it adds.

    python benchmarks/ilora.py                some minutes
    python benchmarks/ilora.py --quick        few pairs
    python benchmarks/ilora.py --tiny         a model of no interest, to try the script

The shape is `electronics` of `engine.py` (160,000 items, hidden 256, 4 layers, batch 128, untied tables),
fp32, after some steps of full training as the base. Adapters: all encoder matrices, rank 8, 4 experts, gate
on the mean of the visible items' embeddings, its time included. Steps are timed in turns in one process, on
the same batches, and a ratio is the geometric mean over pairs of steps with its 95 % bootstrap interval. Peak
memory is taken in a process for each variant, beyond what is resident once the base is loaded. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from engine import configs, dataset_of, resident_bytes

from reclib import hardware
from reclib.config import ENCODER, AdapterConfig, ModelConfig, TrainConfig, changed, model_config
from reclib.data.dataset import Dataset, Histories
from reclib.data.prepare import synthetic_dataset
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel, frozen_twin
from reclib.train import timing
from reclib.train.saving import load_weights, save_weights
from reclib.train.trainer import Trainer

RANK, EXPERTS = 8, 4
KINDS = ("full", "lora", "ilora")
WARMUP = 12  # steps that are not counted: compiled variants meet their shapes
LONG = 10_000  # epochs: the schedule must not end before the last pair


def setting(tiny: bool) -> tuple[Dataset, ModelConfig, TrainConfig]:
    if tiny:
        dataset = synthetic_dataset(300, 200, 9.4, 0)
        model = model_config("nano", num_items=dataset.num_items, max_len=50)
        train = TrainConfig(batch_size=32)
    else:
        dataset = dataset_of("electronics")
        model, train = configs("electronics", dataset.num_items)
    return dataset, model, changed(train, epochs=LONG, learning_rate=1e-4)


def histories_of(dataset: Dataset) -> Histories:
    return Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])


def train_base(given: argparse.Namespace, folder: Path) -> None:
    """Train the base in full for some steps and write it."""
    dataset, model, train = setting(given.tiny)
    torch.manual_seed(0)
    config = changed(train, max_steps=given.base_steps, learning_rate=1e-3)
    trainer = Trainer(Bert4Rec(model), histories_of(dataset), config, hardware.resolve("cpu"), "base")
    for _ in trainer.steps():
        pass
    save_weights(trainer.model, folder, {})


def adapter(kind: str) -> AdapterConfig:
    return AdapterConfig(kind=kind, rank=RANK, num_experts=EXPERTS, alpha=8.0, targets=ENCODER)


def variant(base: Bert4Rec, kind: str, compiled: bool, tiny: bool) -> Trainer:
    """Return a trainer of the base, in full or with an adapter; adapters share the base's tensors."""
    dataset, _, train = setting(tiny)
    model: Any = base
    if kind != "full":
        model = AdaptedModel(frozen_twin(base))
        torch.manual_seed(0)
        model.add(kind, adapter(kind))
    config = changed(train, compile_mode="default" if compiled else "off")
    return Trainer(model, histories_of(dataset), config, hardware.resolve("cpu"), kind)


# -- time ----------------------------------------------------------------------------------------------------


def time_steps(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    frozen = load_weights(folder)
    trained = copy.deepcopy(frozen).requires_grad_(True)
    names = {"full": ("full", False), "lora": ("lora", False), "ilora": ("ilora", False)}
    if hardware.has_compiler():
        names |= {"lora, compiled": ("lora", True), "ilora, compiled": ("ilora", True)}
    trainers = {
        name: variant(trained if kind == "full" else frozen, kind, compiled, given.tiny)
        for name, (kind, compiled) in names.items()
    }
    found = timing.interleave(trainers, 1, WARMUP, given.pairs)
    lost = {name: m.reason for name, m in found.items() if m.status != "ok"}
    if lost:
        raise SystemExit(f"error: no pairs: {lost}")
    print(f"\n{'variant':<18}{'step s':>9}{'quartiles':>18}{'trained':>12}{'compile s':>11}{'last loss':>11}")
    for name, one in found.items():
        low, middle, high = one.quartiles
        count = sum(p.numel() for p in trainers[name].parameters)
        spread, seconds = f"{low:.4f}-{high:.4f}", f"{one.compile_seconds:.1f}"
        print(f"{name:<18}{middle:>9.4f}{spread:>18}{count:>12,}{seconds:>11}{one.losses[-1]:>11.4f}")
    pairs = {
        "ilora_over_lora_step": ("ilora", "lora"),
        "ilora_over_full_step": ("ilora", "full"),
        "lora_over_full_step": ("lora", "full"),
        "ilora_compiled_over_eager": ("ilora, compiled", "ilora"),
        "lora_compiled_over_eager": ("lora, compiled", "lora"),
        "ilora_over_lora_step_compiled": ("ilora, compiled", "lora, compiled"),
    }
    result: dict[str, Any] = {
        f"{n.replace(', ', '_')}_step_seconds": m.median_seconds for n, m in found.items()
    }
    print(f"\n{'ratio of steps':<32}{'mean':>8}{'95 % interval':>18}")
    for key, (above, below) in pairs.items():
        if above not in found:
            continue
        mean, low, high = timing.paired_ratio(found[above], found[below])
        interval = f"{low:.3f}-{high:.3f}"
        print(f"{key:<32}{mean:>8.3f}{interval:>18}")
        result |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return result


# -- memory --------------------------------------------------------------------------------------------------


def child_memory(given: argparse.Namespace) -> dict[str, Any]:
    """Return the peak of a few steps beyond what is resident when the base is loaded."""
    base = load_weights(given.base)
    base.requires_grad_(True)
    where = torch.device("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    loaded = resident_bytes()
    hardware.reset_peak_memory(where)
    trainer = variant(base, given.child, False, given.tiny)
    timing.measure(trainer, 3, 2)
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    added = hardware.peak_memory_bytes(where) - loaded
    return {"added_bytes": added, "weight_bytes": weights}


def measure_memory(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(given.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, "--child", kind, "--base", str(folder)]
            command += ["--threads", str(given.threads), *(["--tiny"] if given.tiny else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
            rows[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
    added = {kind: median(row["added_bytes"] for row in rows[kind]) for kind in KINDS}
    print(f"\n{'variant':<18}{'weights MB':>12}{'added at the peak MB':>22}")
    for kind in KINDS:
        print(f"{kind:<18}{rows[kind][0]['weight_bytes'] / 1e6:>12.0f}{added[kind] / 1e6:>22.0f}")
    result: dict[str, Any] = {f"{kind}_added_bytes": added[kind] for kind in KINDS}
    result["added_memory_over_full"] = added["ilora"] / added["full"]
    return result


# -- size ----------------------------------------------------------------------------------------------------


def shares() -> dict[str, Any]:
    """Return the trained share of the parameters at 130M, with the encoder alone and with the head."""
    model = Bert4Rec(model_config("130m"))
    adapted = AdaptedModel(model)
    adapted.add("encoder", adapter("ilora"))
    counts = adapted.counts()
    adapted.add("head", changed(adapter("ilora"), targets=(*ENCODER, "head")))
    head = adapted.counts()["tables_and_head"]
    trained = counts["encoder"] + counts["gate"]
    said = {"trained_share_130m": trained / counts["base"]}
    said["trained_share_130m_with_head"] = (trained + head) / counts["base"]
    print(f"\n130m, rank {RANK}: {trained:,} of {counts['base']:,} parameters; {head:,} more with the head")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="six pairs, one round of memory")
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to try the script")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of memory")
    parser.add_argument("--base-steps", type=int, default=60, help="of full training before the adapters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--base", type=Path, help="a model written by saving.save_weights, instead of training one"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        print(json.dumps(child_memory(given)))
        return
    if given.quick:
        given.pairs, given.rounds = 6, 1
    about = {"quick": given.quick, "tiny": given.tiny, "threads": given.threads, "pairs": given.pairs}
    with tempfile.TemporaryDirectory() as place:
        folder = given.base or Path(place) / "base"
        if given.base is None:
            train_base(given, folder)
        result = measure_memory(given, folder) | time_steps(given, folder) | ({} if given.tiny else shares())
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()
