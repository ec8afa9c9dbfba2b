"""One training run, written down: what a notebook hands to processes that it does not contain.

`python -m reclib.fit --run FILE` trains what the file says, and `--dataset`, `--size` and `-p` make the same
in memory. The file is JSON, and of the split it names only the rule: whoever reads it compares what comes
out with `identity`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, model_config, validated
from reclib.data import Dataset
from reclib.splits import Split, global_time, leave_one_out, random_users

SPLITS: dict[str, Callable[[Dataset], Split]] = {  # by the name that each gives its result
    "leave-one-out": leave_one_out,
    "global time": global_time,
    "random users (the seed study's)": random_users,
}


@dataclass(frozen=True)
class Setup:
    """What is to be trained, on what."""

    data: DataConfig
    train: TrainConfig
    size: str | None  # a name of config.SIZES; None: the shape states all
    shape: dict[str, Any]  # fields of ModelConfig, in place of the size's
    split: str = "leave-one-out"  # a name of SPLITS
    identity: str | None = None  # what the data of the run must be; None: whatever they are
    group: str = "fit"  # under which a tracker shows it
    title: str | None = None  # and as what; None: as the folder's name

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"unknown split {self.split!r}; known: {', '.join(SPLITS)}")
        self.model(1)

    def model(self, num_items: int) -> ModelConfig:
        """Return the model for a catalogue of `num_items`, unless the shape states another."""
        if self.size is None:
            return validated(ModelConfig, self.shape)
        causal = self.train.objective == "next_item"
        return model_config(self.size, **{"num_items": num_items, "causal": causal} | self.shape)


def of_options(dataset: str, size: str, values: Mapping[str, Any]) -> Setup:
    """Return the setup of the command line: fields of TrainConfig, and `model.<field of ModelConfig>`."""
    train = validated(TrainConfig, {name: value for name, value in values.items() if "." not in name})
    own = {name: value for name, value in values.items() if name.startswith("model.")}
    if strange := [name for name in values if "." in name and name not in own]:
        raise InputError(
            f"unknown parameter {strange[0]!r}: expected a field of TrainConfig or model.<field>"
        )
    shape = {name.removeprefix("model."): value for name, value in own.items()}
    return Setup(validated(DataConfig, {"dataset": dataset}), train, size, shape)


def write(file: Path, setup: Setup) -> None:
    """Write a setup in place of one that is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".partial")
    fresh.write_text(json.dumps(asdict(setup), indent=1) + "\n", encoding="utf-8")
    fresh.replace(file)


def read(file: Path) -> Setup:
    """Return the setup of a file; raise `InputError` that names the file unless it is one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        data, train = validated(DataConfig, found["data"]), validated(TrainConfig, found["train"])
        return Setup(**(found | {"data": data, "train": train}))
    except OSError as error:
        raise InputError(f"cannot read the run file {file.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.name} is no run file: {error}") from None
