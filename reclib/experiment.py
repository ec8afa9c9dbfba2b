"""From the parameters of notebook 02 to its training runs: BERT4Rec and its causal twin, under any split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reclib import launch, paths, provenance, runfile, tracker
from reclib.config import DataConfig, ModelConfig, TrainConfig, as_dict, model_config, validated
from reclib.curves import Curves
from reclib.data import Dataset
from reclib.fit import SELECT, Options, data_identity, fit, is_finished
from reclib.hardware import Device
from reclib.notebook_params import Baseline, Scaling
from reclib.runfile import Setup
from reclib.splits import Split
from reclib.trainer import Trainer

OBJECTIVES = {"bert4rec": "cloze", "causal": "next_item"}  # the models of notebook 02


@dataclass
class Trained:
    """One seed's run: its trainer, with the weights that were best on validation."""

    seed: int
    trainer: Trainer

    def curve(self) -> dict[str, list[float]]:
        """Return the columns of the learning curve, one value per evaluation."""
        rows = self.trainer.progress.history
        names = {"epoch": "epoch", "train_loss": "train_loss", f"valid_{SELECT}": SELECT, "tokens": "tokens"}
        if all("valid_loss" in row for row in rows):  # not in a run begun before the loss was evaluated
            names["valid_loss"] = "valid_loss"
        return {name: [row[key] for row in rows] for name, key in names.items()}

    def best(self) -> dict[str, float]:
        """Return validation at the chosen epoch."""
        row = max(self.trainer.progress.history, key=lambda row: row[SELECT])
        return {f"valid_{name}": row[name] for name in ("hr@10", "ndcg@10")} | {"epoch": row["epoch"]}

    def losses(self) -> dict[str, float]:
        """Return the lowest loss on validation and the last, in nats; nothing where it was not evaluated.

        The lowest is what a run stopped early would have: a law of size is about that one. `late_drop` is
        what the last fifth of the training took off it: a run with much of it is undertrained.
        """
        values = self.curve().get("valid_loss")
        if not values:
            return {}
        before = min(values[: max(1, len(values) * 4 // 5)])
        lowest = min(values)
        return {"lowest_valid_loss": lowest, "last_valid_loss": values[-1], "late_drop": before - lowest}

    def together(self) -> dict[str, Any]:
        """Return how many processes trained it and what joined them; nothing where it was one."""
        progress = self.trainer.progress
        if progress.processes == 1:
            return {}
        return {"processes": progress.processes, "backend": progress.backend}

    def timings(self) -> dict[str, float]:
        """Return what the run took."""
        progress = self.trainer.progress
        return {
            "train_seconds": progress.train_seconds,
            "eval_seconds": sum(row["eval_seconds"] for row in progress.history),
            "tokens_per_second": progress.tokens / progress.train_seconds,
        }


def model_of(p: Baseline, dataset: Dataset, objective: str = "cloze") -> ModelConfig:
    """Return the model that the parameters ask for, on the dataset's catalogue."""
    shared = ("dropout", "max_len", "norm", "tied", "output_bias")
    given: dict[str, Any] = {name: getattr(p, name) for name in shared} | {"num_items": dataset.num_items}
    return model_config(p.size, **given, causal=objective == "next_item")


def train_of(p: Baseline, seed: int, objective: str = "cloze") -> TrainConfig:
    """Return one seed's training configuration."""
    shared = (
        "epochs", "batch_size", "micro_batch_size", "learning_rate", "mask_prob", "last_item_share",
        "window", "loss", "eval_every", "patience",
    )  # fmt: skip
    given: dict[str, Any] = {name: getattr(p, name) for name in shared}
    given |= {"seed": seed, "objective": objective}
    given |= {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    return validated(TrainConfig, given)


def run_folder(notebook: str, model: ModelConfig, train: TrainConfig, data: str, nproc: int = 1) -> Path:
    """Return the folder of a run's checkpoints; another configuration, data, code or `nproc` has another."""
    parts: list[Any] = [asdict(model), as_dict(train), data, provenance.code_hash(notebook)]
    parts += [nproc] if nproc > 1 else []
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return paths.runs() / notebook / key


def train_seed(
    notebook: str, p: Baseline, dataset: Dataset, split: Split, device: Device, name: str, seed: int
) -> Trained:
    """Train one seed of a model of `OBJECTIVES`, or go on with a run of the same code and data."""
    objective = OBJECTIVES[name]
    model, train = model_of(p, dataset, objective), train_of(p, seed, objective)
    title = f"{notebook}-{device.label}-{name}-{split.name.split()[0]}-seed{seed}"
    return carried_out(notebook, p, dataset, split, device, model, train, title)


def carried_out(
    notebook: str,
    p: Baseline | Scaling,
    dataset: Dataset,
    split: Split,
    device: Device,
    model: ModelConfig,
    train: TrainConfig,
    title: str,
) -> Trained:
    """Train a model as a notebook's parameters say: here, or by several processes beside the notebook.

    Those leave a finished run in the folder of checkpoints, and that is read back. Raises `InputError` with
    what they said where they failed.
    """
    data = data_identity(dataset, split)
    folder = run_folder(notebook, model, train, data, p.nproc)
    about = {"model": asdict(model), "train": asdict(train), "data": data}
    if p.nproc > 1:
        if not is_finished(folder):
            given = DataConfig(dataset=p.dataset, min_user=p.min_user, min_item=p.min_item)
            setup = Setup(given, train, None, asdict(model), split.name, data, notebook, title)
            runfile.write(folder / "run.json", setup)
            words = ["--run", str(folder / "run.json"), "--out", str(folder)]
            launch.apart([*words, "--gpu", p.gpu, "--tracker", p.tracker], p.nproc)
        return Trained(train.seed, fit(model, dataset, train, device, folder, split=split))
    with tracker.start(p.tracker, notebook, title, about) as track:
        curves = Curves(track, device)
        options = Options(on_step=curves.step, on_evaluation=curves.evaluation)
        return Trained(train.seed, fit(model, dataset, train, device, folder, options, split))
