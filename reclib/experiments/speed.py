"""What AMP and `torch.compile` give on this device: the timings of one notebook.

The grid is precision x compile mode x batch size, its variants in turns. What does not apply on a device is a
row that says so, and so is what runs out of memory. The ladder goes from the seed study's step to ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from reclib import hardware
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, changed, model_config
from reclib.cost import work
from reclib.data.dataset import Dataset, Histories
from reclib.data.prepare import prepare, synthetic_dataset, train_histories
from reclib.experiments.adaptation import arm_model
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.parameters import AmpCompile, ILora
from reclib.train import timing
from reclib.train.timing import EPOCHS, Measurement, break_even_steps, merged
from reclib.train.trainer import Trainer

# ------------------------------------------------------------------------------------------------
# From the step of the study that this one started from to ours: one changed field at a time.
#
# The first rung re-creates that study's step: focal cross-entropy over every position that is not padding,
# rows padded to their full length, logits at all of them, dropout on attention, an optimiser that takes one
# tensor at a time. Every other rung changes a single field of the configuration, so that what it gives is
# its own. Which positions are masked is drawn as in ours on every rung; the cost does not depend on it.

SEED_MODEL: dict[str, Any] = {"attention_dropout": 0.1}

SEED_TRAIN: dict[str, Any] = {
    "objective": "seed_focal",
    "layout": "padded",
    "head_rows": "all",
    "optimizer": "loop",
    "loss": "plain",
    "precision": "fp32",
    "compile_mode": "off",
}


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: the configurations that it trains with, and what it changed."""

    name: str
    change: str  # "field=value"
    model: ModelConfig
    train: TrainConfig


# Name, field and value of each change after the seed study's step. "auto" routes are resolved per device.
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("masked positions only", "objective", "cloze"),
    ("no dropout on attention", "attention_dropout", 0.0),
    ("gather before the head", "head_rows", "targets"),
    ("packed rows", "layout", "packed"),
    ("fused AdamW", "optimizer", "fused"),
    ("loss in place or in chunks", "loss", "auto"),
)


def ladder(model: ModelConfig, train: TrainConfig, more: tuple[tuple[str, str, Any], ...] = ()) -> list[Rung]:
    """Return the rungs, the seed study's step first; `more` changes follow the last (precision, compile)."""
    model, train = changed(model, **SEED_MODEL), changed(train, **SEED_TRAIN)
    rungs = [Rung("seed study's step", "", model, train)]
    in_model = {field.name for field in dataclasses.fields(model)}
    for name, key, value in (*CHANGES, *more):
        if key in in_model:
            model = changed(model, **{key: value})
        else:
            train = changed(train, **{key: value})
        rungs.append(Rung(name, f"{key}={value}", model, train))
    return rungs


# ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One variant: what was asked for, what ran, and what it took."""

    asked: dict[str, Any]  # precision, compile_mode, batch_size; or the rung
    found: Measurement
    counted: dict[str, int] = field(default_factory=dict)  # parameters and FLOPs of one step
    timings: dict[str, float | int | None] = field(default_factory=dict)

    def metrics(self) -> dict[str, int]:
        """Return what is the same on every device."""
        return self.counted | (self.found.counts() if self.found.status == "ok" else {})

    def own_params(self) -> dict[str, Any]:
        """Return what the row is of, whether it ran, and why not."""
        return self.asked | {"status": self.found.status, "reason": self.found.reason}


def dataset_of(p: AmpCompile) -> Dataset:
    """Return the histories that the parameters ask for."""
    if p.dataset == "synthetic":
        return synthetic_dataset(p.synthetic_users, p.synthetic_items, p.synthetic_mean_len, p.seed)
    return prepare(DataConfig(dataset=p.dataset))


def model_of(p: AmpCompile, dataset: Dataset) -> ModelConfig:
    """Return the model that the parameters ask for, on the dataset's catalogue."""
    return model_config(p.size, num_items=dataset.num_items, max_len=p.max_len)


def train_of(p: AmpCompile, **changes: Any) -> TrainConfig:
    """Return the training configuration of a variant."""
    return TrainConfig(seed=p.seed, epochs=EPOCHS, **changes)


def trainer_of(model: ModelConfig, train: TrainConfig, dataset: Dataset, device: Device) -> Trainer:
    """Return a trainer of weights drawn on the device, the same for the same seed on the same device."""
    torch.manual_seed(train.seed)
    histories = train_histories(dataset)
    with device.torch_device:  # drawing a large table on the host takes seconds
        drawn = Bert4Rec(model)
    return Trainer(drawn, histories, train, device, dataset.fingerprint)


def inapplicable(precision: str, compile_mode: str, device: Device) -> str:
    """Return why a variant cannot run on the device, or nothing."""
    try:
        hardware.choose_precision(precision, device.card)
    except InputError as error:
        return str(error)
    mode, reason = hardware.compile_choice(compile_mode, device.card, hardware.has_compiler())
    return reason if mode == "off" and reason.startswith("not applicable") else ""


def work_rows(p: AmpCompile, dataset: Dataset, device: Device) -> dict[str, int]:
    """Return what the first step holds and costs, counted: sequences, real items, targets, FLOPs by part."""
    train = train_of(p, precision="fp32", batch_size=p.batch_sizes[0])
    trainer = trainer_of(model_of(p, dataset), train, dataset, device)
    batches = timing.step_batches(trainer, 1)
    done, needed = timing.step_flops(trainer, 1)
    return {
        "sequences": sum(batch.num_sequences for batch in batches),
        "tokens": sum(batch.num_tokens for batch in batches),
        "targets": sum(batch.num_targets for batch in batches),
        "row_tokens": sum(batch.items.numel() for batch in batches),
        "encoder_flops": done.encoder,
        "head_flops": done.head,
        "needed_encoder_flops": needed.encoder,
        "needed_head_flops": needed.head,
    }


def grid(p: AmpCompile, dataset: Dataset, device: Device) -> list[Row]:
    """Time every variant of the grid, those of one batch size in turns."""
    return [row for size in p.batch_sizes for row in _one_batch_size(p, dataset, device, size)]


def _one_batch_size(p: AmpCompile, dataset: Dataset, device: Device, batch_size: int) -> list[Row]:
    model = model_of(p, dataset)
    rows: list[Row] = []
    trainers: dict[str, Trainer] = {}  # by the row's number
    for precision in p.precisions:
        for mode in p.compile_modes:
            reason = inapplicable(precision, mode, device)
            asked = {"precision": precision, "compile_mode": mode, "batch_size": batch_size}
            rows.append(Row(asked, Measurement("not applicable", reason) if reason else Measurement("oom")))
            if not reason:
                with contextlib.suppress(torch.OutOfMemoryError):  # no room beside the others: tried alone
                    trainers[str(len(rows) - 1)] = trainer_of(model, train_of(p, **asked), dataset, device)
    for number, found in timing.interleave(
        trainers, p.steps, p.warmup_steps, p.repeats, gpu_energy=True
    ).items():
        rows[int(number)].found = found
        _describe(rows[int(number)], trainers[number], p.warmup_steps + 1)
    trainers.clear()
    for row in rows:
        if row.found.status == "oom":
            _alone(row, model, train_of(p, **row.asked), dataset, device, p)
    _break_even(rows)
    return rows


def _alone(
    row: Row,
    model: ModelConfig,
    train: TrainConfig,
    dataset: Dataset,
    device: Device,
    p: AmpCompile,
    describe: bool = True,
) -> None:
    """Time one variant with nothing else in memory."""
    gc.collect()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        trainer = trainer_of(model, train, dataset, device)
    except (RuntimeError, MemoryError) as error:
        if not timing.is_out_of_memory(error):
            raise
        row.found = Measurement("oom", str(error).splitlines()[0])
        return
    row.found = timing.measure(trainer, p.steps, p.warmup_steps)
    if describe:
        _describe(row, trainer, p.warmup_steps + 1)


def _describe(row: Row, trainer: Trainer, step: int) -> None:
    """Add to a timed row what is counted for it; `step` is one of the timed steps."""
    if row.found.status != "ok":
        return
    done, needed = timing.step_flops(trainer, step)
    row.counted = {
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "encoder_flops": done.encoder,
        "head_flops": done.head,
        "needed_flops": needed.total,
    }
    row.found.reason = row.found.reason or (
        "" if trainer.compile_reason == "asked for" else trainer.compile_reason
    )
    row.asked |= {"ran_precision": trainer.precision.name, "ran_compile_mode": trainer.compile_mode}
    row.asked["head_dtype"] = timing.head_dtype(trainer)
    used = trainer.precision.name
    row.timings = row.found.timings() | {
        "mfu": work.mfu(done.total, row.found.median_seconds, trainer.device.label, used),
        "peak_tensor_bytes": timing.peak_tensor_bytes(trainer),
    }


def _break_even(rows: Iterable[Row]) -> None:
    """Add to each compiled row after how many steps compiling has paid for itself."""
    rows = [row for row in rows if row.found.status == "ok"]
    eager = {row.asked["precision"]: row for row in rows if row.asked["compile_mode"] == "off"}
    for row in rows:
        beside = eager.get(row.asked["precision"])
        if row.found.compiled and beside is not None:
            row.timings["break_even_steps"] = break_even_steps(
                row.found.compile_seconds, beside.found.median_seconds, row.found.median_seconds
            )


def rungs_of(p: AmpCompile, dataset: Dataset, device: Device) -> list[Rung]:
    """Return the ladder at this size, with AMP and compile on top where they were asked for and apply."""
    more: list[tuple[str, str, Any]] = []
    for precision in ("bf16", "fp16"):
        if precision in p.precisions and not inapplicable(precision, "off", device):
            more.append(("AMP", "precision", precision))
            break
    for mode in p.compile_modes:
        if mode != "off" and not inapplicable("fp32", mode, device):
            more.append(("torch.compile", "compile_mode", mode))
            break
    return ladder(model_of(p, dataset), train_of(p, batch_size=p.batch_sizes[0]), tuple(more))


def climb(p: AmpCompile, dataset: Dataset, device: Device) -> list[Row]:
    """Time the ladder's rungs in turns, each alone in memory and built anew in every round."""
    rungs = rungs_of(p, dataset, device)
    rounds = [[_rung(p, rung, dataset, device, n == 0) for rung in rungs] for n in range(p.repeats)]
    rows = []
    for number, rung in enumerate(rungs):
        row, *again = (one[number] for one in rounds)
        row.found = merged([row.found, *(other.found for other in again)])
        row.asked |= {"rung": number, "name": rung.name, "change": rung.change}
        row.timings |= row.found.timings()
        rows.append(row)
    return rows


def _rung(p: AmpCompile, rung: Rung, dataset: Dataset, device: Device, first: bool) -> Row:
    row = Row({}, Measurement("oom"))
    _alone(row, rung.model, rung.train, dataset, device, p, describe=first)
    return row


def breakdown(
    p: AmpCompile, dataset: Dataset, device: Device, precision: str, top: int = 12
) -> list[timing.Operator]:
    """Return where an eager step in `precision` spends its time, by operator."""
    train = train_of(p, precision=precision, batch_size=p.batch_sizes[0])
    return timing.operators(trainer_of(model_of(p, dataset), train, dataset, device), p.steps, top)


def whole_epoch(p: AmpCompile, dataset: Dataset, device: Device) -> timing.EpochClock:
    """Time one epoch of the first variant by the wall clock, after an epoch that warms up."""
    train = train_of(p, precision=p.precisions[0], batch_size=p.batch_sizes[0])
    trainer = trainer_of(model_of(p, dataset), train, dataset, device)
    timing.epoch_clock(trainer)
    return timing.epoch_clock(trainer)


def losses(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return the loss curve of each precision over the same steps, from the eager rows of one batch size."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.found.status == "ok" and not row.found.compiled:
            found.setdefault(row.asked["precision"], row.found.losses)
    return found


def eager_rates(rows: Iterable[Row], batch_size: int) -> dict[str, float]:
    """Return sequences/s of each precision without compiling, at one batch size."""
    return {
        row.asked["precision"]: row.found.sequences_per_second
        for row in rows
        if row.found.status == "ok" and not row.found.compiled and row.asked["batch_size"] == batch_size
    }


# ------------------------------------------------------------------------------------------------
# What a step with adapters costs: time in turns, tensors at the peak, and what is saved.
#
# All variants train the same base on the same batches, on a CPU a step of each in turn, so that their
# ratios are of pairs. `ilora` is timed in every precision and compile mode; the others in the first of
# each. Frozen matrices are held in the precision that products run in, so that no step casts them.

PLAIN = ("full", "lora", "gated", "head")  # timed beside ilora, where they are arms


def variants(p: ILora) -> list[dict[str, str]]:
    """Return what is timed: the arms in the first precision and mode, and ilora in all."""
    first: dict[str, str] = {"precision": p.precisions[0], "compile_mode": p.compile_modes[0]}
    plain: list[dict[str, str]] = [{"model": arm} | first for arm in PLAIN if arm in p.arms]
    grid: list[dict[str, str]] = [
        {"model": "ilora", "precision": precision, "compile_mode": mode}
        for precision in p.precisions
        for mode in p.compile_modes
    ]
    return [*plain, *grid]


def adapter_trainer(
    p: ILora,
    asked: dict[str, str],
    base: Bert4Rec,
    histories: Histories,
    device: Device,
    reader: Bert4Rec | None = None,
) -> Trainer:
    """Return a trainer of one variant, on a copy of the base; `reader` is of `adaptation.train_reader`."""
    train = TrainConfig(
        seed=p.seeds[0],
        epochs=EPOCHS,
        batch_size=p.batch_size,
        mask_prob=p.mask_prob,
        last_item_share=p.last_item_share,
        learning_rate=p.learning_rates[0],
        precision=asked["precision"],  # type: ignore[arg-type]  # a name of `Precision`, validated
        compile_mode=asked["compile_mode"],  # type: ignore[arg-type]
    )
    model = arm_model(p, asked["model"], base, p.seeds[0], reader)
    chosen = hardware.choose_precision(train.precision, device.card)
    if isinstance(model, AdaptedModel) and chosen.autocast_dtype is not None:
        model.hold_frozen(chosen.autocast_dtype)
    return Trainer(model, histories, train, device, "timed")


def adapter_grid(
    p: ILora, base: Bert4Rec, dataset: Dataset, device: Device, reader: Bert4Rec | None = None
) -> list[Row]:
    """Time all variants in turns; what cannot run on the device is a row that says why."""
    histories = Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])
    rows: list[Row] = []
    trainers: dict[str, Trainer] = {}  # by the row's number
    for asked in variants(p):
        reason = inapplicable(asked["precision"], asked["compile_mode"], device)
        rows.append(Row(dict(asked), Measurement("not applicable", reason)))
        if not reason:
            trainers[str(len(rows) - 1)] = adapter_trainer(p, asked, base, histories, device, reader)
    # A GPU computes a step while the next is launched: there turns of one step would time the launches.
    turn = p.rounds if device.torch_device.type == "cuda" else 1
    found = timing.interleave(trainers, turn, p.warmup_steps, p.rounds // turn)
    for number, one in found.items():
        row, trainer = rows[int(number)], trainers[number]
        row.found = one
        row.counted = {
            "trained": sum(parameter.numel() for parameter in trainer.parameters),
            "trained_bytes": sum(q.numel() * q.element_size() for q in trainer.parameters),
            "base": sum(parameter.numel() for parameter in base.parameters()),
        }
        row.asked |= {"ran_precision": trainer.precision.name, "ran_compile_mode": trainer.compile_mode}
        if one.status == "ok":
            row.timings = one.timings() | {"peak_tensor_bytes": timing.peak_tensor_bytes(trainer)}
    _ratios(rows)
    return rows


def _ratios(rows: list[Row]) -> None:
    """Add to each timed row its step over that of full fine-tuning, of lora and of eager ilora, in pairs."""
    timed = [row for row in rows if row.found.status == "ok"]
    first = {row.asked["model"]: row for row in reversed(timed)}  # of ilora the first precision and mode
    for row in timed:
        for other in ("full", "lora", "ilora"):
            if other in first and first[other] is not row:
                ratio = timing.paired_ratio(row.found, first[other].found)
                own: dict[str, Any] = {"": ratio.mean, "_low": ratio.low, "_high": ratio.high}
                row.timings |= {f"over_{other}{end}": value for end, value in own.items()}
