"""Timed training steps: a ladder from the seed study's step, precisions and compile modes, and adapters.

Variants take turns on the same batches. A variant that a device cannot run, or that runs out of memory, is a
row with that status.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from reclib import hardware
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, changed, divided, model_config
from reclib.cost import work
from reclib.data.dataset import Dataset, Histories, train_histories
from reclib.data.prepare import prepare, synthetic_dataset
from reclib.experiments.adaptation import arm_model
from reclib.experiments.notebook import Result
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.parameters import AmpCompile, ILora
from reclib.train import timing
from reclib.train.timing import EPOCHS, Measurement, break_even_steps, merged
from reclib.train.trainer import Trainer, chosen_route


@dataclass
class Row:
    """One variant: its settings, its measurement, and its counts."""

    settings: dict[str, Any]  # precision, compile_mode, batch_size; or the rung; or the arm
    measured: Measurement
    counted: dict[str, int] = field(default_factory=dict)  # parameters and FLOPs of one step
    timings: dict[str, float | int | None] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it was timed."""
        return self.measured.status == "ok"

    def metrics(self) -> dict[str, int]:
        """Return the counts, which are the same on every device."""
        return self.counted | (self.measured.counts() if self.ok else {})

    def own_params(self) -> dict[str, Any]:
        """Return the settings, the status, and its reason."""
        return self.settings | {"status": self.measured.status, "reason": self.measured.reason}


def results(name: str, rows: Iterable[Row]) -> list[Result]:
    """Return rows as results of a name."""
    return [Result(name, row.metrics(), row.own_params(), timings=row.timings) for row in rows]


def table(rows: Iterable[Row], *timings: str) -> pd.DataFrame:
    """Tabulate settings of rows and these timings."""
    return pd.DataFrame([row.own_params() | {key: row.timings.get(key) for key in timings} for row in rows])


def reasons(rows: Iterable[Row]) -> None:
    """Print the distinct reasons of rows that did not run, or ran with other settings."""
    print(
        *(f"- {reason}" for reason in dict.fromkeys(row.measured.reason for row in rows) if reason), sep="\n"
    )


# -- variants ------------------------------------------------------------------------------------------------

# The step of the seed study. Masked positions are drawn as in ours; the cost does not depend on them.
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

# Name, field and value of each change from that step to ours. "auto" routes are resolved per device.
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("masked positions only", "objective", "cloze"),
    ("no dropout on attention", "attention_dropout", 0.0),
    ("gather before the head", "head_rows", "targets"),
    ("packed rows", "layout", "packed"),
    ("fused AdamW", "optimizer", "fused"),
    ("loss in place or in chunks", "loss", "auto"),
)


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: its configurations, and its change to the step before."""

    name: str
    change: str  # "field=value"
    model: ModelConfig
    train: TrainConfig


def ladder(model: ModelConfig, train: TrainConfig, extra: Sequence[tuple[str, str, Any]] = ()) -> list[Rung]:
    """Return the rungs, the seed study's step first, `extra` changes last (precision, compiling)."""
    model, train = changed(model, **SEED_MODEL), changed(train, **SEED_TRAIN)
    rungs = [Rung("seed study's step", "", model, train)]
    for name, key, value in (*CHANGES, *extra):
        of_model, of_train = divided({key: value})
        model, train = changed(model, **of_model), changed(train, **of_train)
        rungs.append(Rung(name, f"{key}={value}", model, train))
    return rungs


def dataset_of(p: AmpCompile) -> Dataset:
    """Return the dataset of the parameters."""
    if p.dataset == "synthetic":
        return synthetic_dataset(p.synthetic_users, p.synthetic_items, p.synthetic_mean_len, p.seed)
    return prepare(DataConfig(dataset=p.dataset))


def model_of(p: AmpCompile, dataset: Dataset) -> ModelConfig:
    """Return the model configuration of the parameters, on the dataset's catalogue."""
    return model_config(p.size, num_items=dataset.num_items, max_len=p.max_len)


def train_of(p: AmpCompile, **changes: Any) -> TrainConfig:
    """Return the training configuration of a variant: fp32 and the first batch size, unless changed."""
    values: dict[str, Any] = {"seed": p.seed, "epochs": EPOCHS, "precision": "fp32"}
    return TrainConfig(**(values | {"batch_size": p.batch_sizes[0]} | changes))


def trainer_of(model: ModelConfig, train: TrainConfig, dataset: Dataset, device: Device) -> Trainer:
    """Return a trainer of weights drawn on the device from the seed."""
    torch.manual_seed(train.seed)
    with device.torch_device:  # drawing a large table on the host takes seconds
        network = Bert4Rec(model)
    return Trainer(network, train_histories(dataset), train, device, dataset.fingerprint)


def inapplicable(precision: str, compile_mode: str, device: Device) -> str:
    """Return why a variant cannot run on the device, "" if it can."""
    try:
        hardware.choose_precision(precision, device.card)
    except InputError as error:
        return str(error)
    mode, reason = hardware.compile_choice(compile_mode, device.card, hardware.has_compiler())
    return reason if mode == "off" and reason.startswith("not applicable") else ""


# -- timing --------------------------------------------------------------------------------------------------


def _in_turns(
    variants: Iterable[Mapping[str, Any]],
    trainer: Callable[[Mapping[str, Any]], Trainer],
    describe: Callable[[Row, Trainer], None],
    device: Device,
    *turns: int,
    gpu_energy: bool = False,
) -> list[Row]:
    """Time variants in turns; `turns` are the steps of a turn, warm-up and rounds of `timing.interleave`.

    A variant without memory beside the others is a row with status "oom".
    """
    rows: list[Row] = []
    trainers: dict[str, Trainer] = {}  # by the row's number
    for number, variant in enumerate(variants):
        reason = inapplicable(variant["precision"], variant["compile_mode"], device)
        rows.append(Row(dict(variant), Measurement("not applicable" if reason else "oom", reason)))
        if not reason:
            with contextlib.suppress(torch.OutOfMemoryError):
                trainers[str(number)] = trainer(variant)
    for key, measurement in timing.interleave(trainers, *turns, gpu_energy=gpu_energy).items():
        rows[int(key)].measured = measurement
        if measurement.status == "ok":
            describe(rows[int(key)], trainers[key])
    return rows


def _describe(row: Row, trainer: Trainer, step: int) -> None:
    """Add counts and timings to a timed row; `step` is one of the timed steps."""
    computed, needed = timing.step_flops(trainer, step)
    row.counted = {
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "encoder_flops": computed.encoder,
        "head_flops": computed.head,
        "needed_flops": needed.total,
    }
    if not row.measured.reason and trainer.compile_reason != "asked for":
        row.measured.reason = trainer.compile_reason
    used = trainer.precision.name
    row.settings |= {"ran_precision": used, "ran_compile_mode": trainer.compile_mode}
    row.settings["head_dtype"] = timing.head_dtype(trainer)
    row.timings = row.measured.timings() | {
        "mfu": work.mfu(computed.total, row.measured.median_seconds, trainer.device.label, used),
        "peak_tensor_bytes": timing.peak_tensor_bytes(trainer),
    }


def _time_alone(
    row: Row, p: AmpCompile, model: ModelConfig, train: TrainConfig, dataset: Dataset, device: Device
) -> Trainer | None:
    """Time one variant with nothing else in memory; return its trainer, None if out of memory."""
    gc.collect()
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        trainer = trainer_of(model, train, dataset, device)
    except (RuntimeError, MemoryError) as error:
        if not timing.is_out_of_memory(error):
            raise
        row.measured = Measurement("oom", str(error).splitlines()[0])
        return None
    row.measured = timing.measure(trainer, p.steps, p.warmup_steps)
    return trainer if row.ok else None


def grid(p: AmpCompile, dataset: Dataset, device: Device) -> list[Row]:
    """Time every precision, compile mode and batch size, those of one batch size in turns."""
    model, rows = model_of(p, dataset), []

    def trainer(variant: Mapping[str, Any]) -> Trainer:
        return trainer_of(model, train_of(p, **variant), dataset, device)

    def describe(row: Row, trainer: Trainer) -> None:
        _describe(row, trainer, p.warmup_steps + 1)

    for size in p.batch_sizes:
        variants = [
            {"precision": precision, "compile_mode": mode, "batch_size": size}
            for precision in p.precisions
            for mode in p.compile_modes
        ]
        turns = (p.steps, p.warmup_steps, p.repeats)
        timed = _in_turns(variants, trainer, describe, device, *turns, gpu_energy=True)
        for row in timed:
            if row.measured.status == "oom" and (
                alone := _time_alone(row, p, model, train_of(p, **row.settings), dataset, device)
            ):
                describe(row, alone)
        eager = {
            row.settings["precision"]: row.measured for row in timed if row.ok and not row.measured.compiled
        }
        for row in timed:
            if row.ok and row.measured.compiled and (beside := eager.get(row.settings["precision"])):
                took = row.measured.compile_seconds, beside.median_seconds, row.measured.median_seconds
                row.timings["break_even_steps"] = break_even_steps(*took)
        rows += timed
    return rows


def rungs_of(p: AmpCompile, dataset: Dataset, device: Device) -> list[Rung]:
    """Return the ladder at this size, with rungs for AMP and compiling if requested and applicable.

    A GPU with memory for the logits has no rung for the route of the loss, which stays `plain`.
    """
    amp = [x for x in ("bf16", "fp16") if x in p.precisions and not inapplicable(x, "off", device)]
    modes = [x for x in p.compile_modes if x != "off" and not inapplicable("fp32", x, device)]
    extra: list[tuple[str, str, Any]] = [("AMP", "precision", x) for x in amp[:1]]
    extra += [("torch.compile", "compile_mode", x) for x in modes[:1]]
    rungs, histories = ladder(model_of(p, dataset), train_of(p), extra), train_histories(dataset)
    routes = [chosen_route(r.train, r.model, histories, device.card, False) for r in rungs]
    return [
        rung
        for rung, route, before in zip(rungs, routes, [None, *routes], strict=False)
        if rung.change != "loss=auto" or route != before
    ]


def climb(p: AmpCompile, dataset: Dataset, device: Device) -> list[Row]:
    """Time the ladder's rungs in turns, each alone in memory and with a new trainer in every round."""
    rungs = rungs_of(p, dataset, device)
    rows = [Row({}, Measurement("oom")) for _ in rungs]
    rounds: list[list[Measurement]] = [[] for _ in rungs]
    for number in range(p.repeats):
        for rung, row, parts in zip(rungs, rows, rounds, strict=True):
            trainer = _time_alone(row, p, rung.model, rung.train, dataset, device)
            if trainer is not None and number == 0:
                _describe(row, trainer, p.warmup_steps + 1)
            parts.append(row.measured)
    for place, (rung, row, parts) in enumerate(zip(rungs, rows, rounds, strict=True)):
        row.measured = merged(parts)
        row.settings |= {"rung": place, "name": rung.name, "change": rung.change}
        row.timings |= row.measured.timings()
    return rows


def work_rows(p: AmpCompile, dataset: Dataset, device: Device) -> dict[str, int]:
    """Return counts of the first step: sequences, real items, targets, FLOPs by part."""
    trainer = trainer_of(model_of(p, dataset), train_of(p), dataset, device)
    batches = timing.step_batches(trainer, 1)
    computed, needed = timing.step_flops(trainer, 1)
    return {
        "sequences": sum(batch.num_sequences for batch in batches),
        "tokens": sum(batch.num_tokens for batch in batches),
        "targets": sum(batch.num_targets for batch in batches),
        "row_tokens": sum(batch.items.numel() for batch in batches),
        "encoder_flops": computed.encoder,
        "head_flops": computed.head,
        "needed_encoder_flops": needed.encoder,
        "needed_head_flops": needed.head,
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
    }


# -- further results of notebook 04 --------------------------------------------------------------------------


def losses(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return the loss curve of each precision over the same steps, from the eager rows of one batch size."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        if row.ok and not row.measured.compiled:
            curves.setdefault(row.settings["precision"], row.measured.losses)
    return curves


def parity(rows: Iterable[Row]) -> list[Result]:
    """Return the loss curve of each precision, with its largest relative distance from the first curve."""
    curves = losses(rows)
    first = next(iter(curves.values()), [])
    results_by_curve = []
    for number, (name, values) in enumerate(curves.items()):
        gap = max(abs(a / b - 1) for a, b in zip(values, first, strict=True))
        series: dict[str, list[Any]] = {"step": list(range(1, len(values) + 1)), "loss": values}
        params = {"precision": name, "number": number}
        timings = {"largest_gap": gap}
        results_by_curve.append(Result("loss_curve", {"steps": len(values)}, params, series, timings=timings))
    return results_by_curve


def eager_rates(rows: Iterable[Row], batch_size: int) -> dict[str, float]:
    """Return sequences/s of each precision without compiling, at one batch size."""
    eager = [row for row in rows if row.ok and not row.measured.compiled]
    of_size = [row for row in eager if row.settings["batch_size"] == batch_size]
    return {row.settings["precision"]: row.measured.sequences_per_second for row in of_size}


def breakdown(p: AmpCompile, dataset: Dataset, device: Device) -> Result:
    """Return the time of an eager step in the first precision by operator."""
    precision = p.precisions[0]
    trainer = trainer_of(model_of(p, dataset), train_of(p, precision=precision), dataset, device)
    rows = timing.operators(trainer, p.steps, 12)
    columns = zip(("operator", "calls", "seconds", "share"), zip(*rows, strict=True), strict=True)
    return Result("operators", {}, {"precision": precision}, {name: list(column) for name, column in columns})


def whole_epoch(p: AmpCompile, dataset: Dataset, device: Device) -> timing.EpochClock:
    """Time one epoch of the first variant by the wall clock, after a warm-up epoch."""
    trainer = trainer_of(model_of(p, dataset), train_of(p, precision=p.precisions[0]), dataset, device)
    timing.epoch_clock(trainer)
    return timing.epoch_clock(trainer)


def published(clock: timing.EpochClock, rows: Iterable[Row]) -> Result:
    """Return the rates of single steps and of a whole epoch, and the published one of them."""
    steady = next(row.measured.sequences_per_second for row in rows if row.ok)
    rate = timing.published_rate(steady, clock.sequences_per_second)
    rates = {"steady": steady, "epoch": clock.sequences_per_second, "published": rate}
    timings = {f"{name}_sequences_per_second": value for name, value in rates.items()}
    timings["epoch_seconds"] = clock.seconds
    return Result("epoch_clock", {"sequences": clock.sequences}, timings=timings)


# -- what a step with adapters costs -------------------------------------------------------------------------

PLAIN = ("full", "lora", "gated", "head")  # timed beside ilora, where they are arms


def variants(p: ILora) -> list[dict[str, str]]:
    """Return the timed variants: the arms in the first precision and mode, ilora in all."""
    arms = [(arm, p.precisions[0], p.compile_modes[0]) for arm in PLAIN if arm in p.arms]
    arms += [("ilora", precision, mode) for precision in p.precisions for mode in p.compile_modes]
    return [dict(zip(("model", "precision", "compile_mode"), arm, strict=True)) for arm in arms]


def adapter_grid(
    p: ILora, base: Bert4Rec, dataset: Dataset, device: Device, reader: Bert4Rec | None = None
) -> list[Row]:
    """Time a step of each of `variants` from the same base on the same batches, in turns of one step.

    `reader` is the model of `adaptation.train_reader`. Frozen matrices are stored in the precision of the
    products, so that no step casts them. Ratios are of paired steps.
    """
    histories = Histories(dataset.items, dataset.offsets[:-1], dataset.offsets[1:])

    def trainer(variant: Mapping[str, Any]) -> Trainer:
        shared = ("batch_size", "mask_prob", "last_item_share")
        values: dict[str, Any] = {name: getattr(p, name) for name in shared}
        values |= {name: variant[name] for name in ("precision", "compile_mode")}
        model = arm_model(p, variant["model"], base, p.seeds[0], reader)
        dtype = hardware.choose_precision(variant["precision"], device.card).autocast_dtype
        if isinstance(model, AdaptedModel) and dtype is not None:
            model.hold_frozen(dtype)
        train = TrainConfig(seed=p.seeds[0], epochs=EPOCHS, learning_rate=p.learning_rates[0], **values)
        return Trainer(model, histories, train, device, "timed")

    def describe(row: Row, trainer: Trainer) -> None:
        sizes = [(q.numel(), q.numel() * q.element_size()) for q in trainer.parameters]
        row.counted = dict(zip(("trained", "trained_bytes"), map(sum, zip(*sizes, strict=True)), strict=True))
        row.counted["base"] = sum(parameter.numel() for parameter in base.parameters())
        row.settings |= {"ran_precision": trainer.precision.name, "ran_compile_mode": trainer.compile_mode}
        row.timings = row.measured.timings() | {"peak_tensor_bytes": timing.peak_tensor_bytes(trainer)}

    # A GPU computes a step while the next is launched: there turns of one step would time the launches.
    turn = p.rounds if device.torch_device.type == "cuda" else 1
    rows = _in_turns(variants(p), trainer, describe, device, turn, p.warmup_steps, p.rounds // turn)
    timed = [row for row in rows if row.ok]
    first = {row.settings["model"]: row for row in reversed(timed)}  # of ilora the first precision and mode
    for row in timed:
        for reference in ("full", "lora", "ilora"):
            if reference in first and first[reference] is not row:
                ratio = timing.paired_ratio(row.measured, first[reference].measured)
                names = (f"over_{reference}", f"over_{reference}_low", f"over_{reference}_high")
                row.timings |= dict(zip(names, ratio, strict=True))
    return rows
