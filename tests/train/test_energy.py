from __future__ import annotations

import pytest
import torch

from reclib.train import timing

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of a CPU whose counters a test sets, in microjoules."""

    def count(*values: int) -> None:
        for number, value in enumerate(values):
            folder = tmp_path / f"intel-rapl:{number}"
            folder.mkdir(exist_ok=True)
            (folder / "energy_uj").write_text(f"{value}\n")

    reader = timing._rapl
    monkeypatch.setattr(timing, "_rapl", lambda: reader(tmp_path))
    return count


def test_energy_is_what_all_packages_counted_since_the_start(packages):
    packages(1_000_000, 5_000_000)
    meter = timing.Meter(CPU)
    packages(4_000_000, 7_500_000)
    assert meter.joules(10.0) == pytest.approx(5.5)


def test_what_cannot_be_read_is_none_and_not_zero(packages):
    assert timing.Meter(CPU).joules(100.0) is None  # no counter
    for before, after, seconds in (  # a short region, a counter that wrapped
        (0, 10**6, timing.SHORTEST / 2),
        (9_000_000, 1_000, 10.0),
    ):
        packages(before)
        meter = timing.Meter(CPU)
        packages(after)
        assert meter.joules(seconds) is None
