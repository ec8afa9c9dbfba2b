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


def test_a_region_too_short_for_the_counter_has_no_energy(packages):
    packages(0)
    meter = timing.Meter(CPU)
    packages(10**6)
    assert meter.joules(timing.SHORTEST / 2) is None


def test_a_counter_that_wrapped_has_no_energy(packages):
    packages(9_000_000)
    meter = timing.Meter(CPU)
    packages(1_000)
    assert meter.joules(10.0) is None


def test_where_nothing_can_be_read_energy_is_none_and_not_zero(packages):
    assert timing.Meter(CPU).joules(100.0) is None
