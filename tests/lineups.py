"""A small base with its adapters, trained once, that the tests of recommendations and of widgets share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import smoke

from reclib import hardware
from reclib.data.dataset import Dataset
from reclib.experiments import explore
from reclib.experiments.explore import Lineup
from reclib.parameters import Explore

CPU = hardware.resolve("cpu")
SMALL = {"max_len": 16, "batch_size": 32, "epochs": 6, "adapter_epochs": 4, "history_items": 6, "top_k": 5}


def asked(**changes: object) -> Explore:
    return smoke("07_explore", **(SMALL | changes))


def trained(dataset: Dataset, folder: Path) -> Iterator[Lineup]:
    """Yield a lineup; its runs and kept models are in `folder`, where the next to ask finds them trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_RUNS", str(folder / "runs"))
        patch.setenv("RECLIB_MODELS", str(folder / "models"))
        yield explore.lineup(asked(), dataset, CPU)
