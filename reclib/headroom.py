"""Whether a training fits into the memory of the device at hand, asked before anything is allocated."""

from __future__ import annotations

from reclib import footprint
from reclib.config import ModelConfig, TrainConfig, changed
from reclib.data import Histories
from reclib.footprint import Footprint
from reclib.hardware import Device, choose_precision


def device_bytes(device: Device) -> int:
    """Return the memory of a device in bytes, for a CPU what the machine or its container has."""
    return device.card.memory_bytes or footprint.machine_bytes()


def demand_room(
    model: ModelConfig,
    config: TrainConfig,
    histories: Histories,
    device: Device,
    room: int | None = None,
    processes: int = 1,
) -> Footprint:
    """Return the estimated peak of a training; raise `InputError` that says what to change.

    `room` is the memory in bytes, None: what the device has. Of several `processes`, which divide a batch, it
    is one's. Nothing is allocated.
    """
    kind, lengths = device.torch_device.type, histories.ends - histories.starts
    lengths = lengths[lengths > int(model.causal)]  # the others train nothing
    if room is None:
        room = device_bytes(device)
    precision = choose_precision(config.precision, device.card).name
    if processes > 1 and config.micro_batch_size is None:
        config = changed(config, micro_batch_size=max(1, config.batch_size // processes))
    return footprint.require_fit(model, config, lengths, room, precision, kind)
