"""What a step with adapters costs: time in turns, tensors at the peak, and what is saved.

All variants train the same base on the same batches, on a CPU a step of each in turn, so that their ratios
are of pairs. `ilora` is timed in every precision and compile mode; the others in the first of each. Frozen
matrices are held in the precision that products run in, so that no step casts them.
"""

from __future__ import annotations

from typing import Any

from reclib import benchmark, hardware, profiling
from reclib.adaptation import model_of
from reclib.config import TrainConfig
from reclib.data import Dataset, Histories
from reclib.hardware import Device
from reclib.ilora import AdaptedModel
from reclib.measurement import Measurement
from reclib.model import Bert4Rec
from reclib.notebook_params import ILora
from reclib.speed import EPOCHS, Row, inapplicable
from reclib.trainer import Trainer

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


def trainer_of(
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
    model = model_of(p, asked["model"], base, p.seeds[0], reader)
    chosen = hardware.choose_precision(train.precision, device.card)
    if isinstance(model, AdaptedModel) and chosen.autocast_dtype is not None:
        model.hold_frozen(chosen.autocast_dtype)
    return Trainer(model, histories, train, device, "timed")


def grid(
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
            trainers[str(len(rows) - 1)] = trainer_of(p, asked, base, histories, device, reader)
    # A GPU computes a step while the next is launched: there turns of one step would time the launches.
    turn = p.rounds if device.torch_device.type == "cuda" else 1
    found = benchmark.interleave(trainers, turn, p.warmup_steps, p.rounds // turn)
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
            row.timings = one.timings() | {"peak_tensor_bytes": profiling.peak_tensor_bytes(trainer)}
    _ratios(rows)
    return rows


def _ratios(rows: list[Row]) -> None:
    """Add to each timed row its step over that of full fine-tuning, of lora and of eager ilora, in pairs."""
    timed = [row for row in rows if row.found.status == "ok"]
    first = {row.asked["model"]: row for row in reversed(timed)}  # of ilora the first precision and mode
    for row in timed:
        for other in ("full", "lora", "ilora"):
            if other in first and first[other] is not row:
                ratio = benchmark.paired_ratio(row.found, first[other].found)
                own: dict[str, Any] = {"": ratio.mean, "_low": ratio.low, "_high": ratio.high}
                row.timings |= {f"over_{other}{end}": value for end, value in own.items()}
