"""A grid that trains in seconds: its file, and the work of it on the CPU."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from reclib.data.prepare import prepare
from reclib.evaluate import baselines
from reclib.experiments import grids
from reclib.hardware import resolve

DATA = {"dataset": "synthetic", "synthetic_users": 40, "synthetic_items": 30}
DATA |= {"min_user": 1, "min_item": 1}
FILE = {
    "about": "a test",
    "notebook": "02_baseline",
    "data": DATA,
    "size": "nano",
    "seeds": [0, 1],
    "model": {"max_len": 20},
    "train": {"epochs": 2, "batch_size": 8, "eval_every": 1},
    "arms": {"base": {"final": True}, "twin": {"train": {"objective": "next_item"}, "seeds": [0]}},
}


def write_params(folder: str, content: dict) -> None:
    """Write `params/<folder>/trial.yaml` of the project root that the environment names."""
    file = Path(os.environ["RECLIB_ROOT"]) / "params" / folder / "trial.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def write(root: Path, **changes: object) -> None:
    """Write the grid's file with some keys changed; `root` is the fixture that sets the environment."""
    write_params("grids", FILE | changes)


def work() -> grids.Work:
    """Return the grid as its file stands now."""
    grid = grids.read_grid("trial")
    return grids.Work(grid, prepare(grid.data), resolve("cpu"))


def light_scoring(patch: pytest.MonkeyPatch) -> None:
    """Score with few resamples, and with the first values of the baselines' hyperparameters alone."""
    every = baselines.families

    def few(times: np.ndarray | None = None) -> dict[str, baselines.Family]:
        families = every(times).items()
        return {name: f._replace(grid={k: v[:1] for k, v in f.grid.items()}) for name, f in families}

    patch.setattr(baselines, "families", few)
    patch.setattr(grids, "SAMPLES", 100)
