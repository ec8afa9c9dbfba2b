import json
from itertools import pairwise
from pathlib import Path

import bound
import numpy as np
import pytest
import torch
from conftest import ROOT, smoke
from small_models import histories, small_model

from reclib import hardware, records, runner
from reclib.config import TrainConfig
from reclib.cost import work
from reclib.experiments import speed
from reclib.experiments.speed import CHANGES, ladder
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.timing import Measurement, break_even_steps, published_rate
from reclib.train.trainer import StepStats, Trainer

LENGTHS = [3, 9, 12, 5, 7, 2, 30, 11, 4, 6, 8]  # 11 users: steps of 4 leave a ragged last one of 3
CPU = hardware.resolve("cpu")


def a_trainer(model=None, lengths=LENGTHS, train=None, **changes) -> Trainer:
    torch.manual_seed(0)
    train = train or TrainConfig(**({"batch_size": 4, "epochs": 50} | changes))
    return Trainer(Bert4Rec(model or small_model()), histories(lengths), train, CPU, "test")


def stats(**counts: float) -> StepStats:
    zero = torch.zeros(())
    base = {"num_sequences": 4, "num_tokens": 30, "num_targets": 6, "row_tokens": 40, "target_slots": 8}
    return StepStats(1, 0, 1e-3, zero, None, **(base | {"fetch_seconds": 0.1} | counts))


def test_rates_are_what_the_median_step_does():
    measured = Measurement(warmup_steps=2, warmup_seconds=7.0, compiled=True)
    for seconds in (1.0, 2.0, 9.0):
        measured.add(stats(), seconds)
    rates = {"sequences_per_second": 2.0, "tokens_per_second": 15.0, "targets_per_second": 3.0}
    assert (rates | {"step_seconds": 2.0}).items() <= measured.timings().items()
    assert measured.timings()["fetch_share"] == pytest.approx(0.3 / 12)
    assert measured.compile_seconds == 3.0  # 7 s of warm-up less two median steps
    assert Measurement("oom", "no room").timings() == {}


def test_published_rates_and_break_even():
    assert published_rate(100.0, 96.0) == 100.0
    assert published_rate(100.0, 95.0) == 95.0  # 5.3 % too high
    assert published_rate(100.0, 106.0) == 106.0  # and too low counts as well
    assert break_even_steps(10.0, 0.5, 0.25) == 40
    assert break_even_steps(10.1, 0.5, 0.25) == 41
    assert break_even_steps(10.0, 0.5, 0.5) is None


def test_interleaved_variants_take_turns_and_the_same_steps_as_alone(monkeypatch):
    order, round_of = [], timing._Clock.round

    def noted(clock, steps):
        order.append(clock.trainer.config.layout)
        round_of(clock, steps)

    monkeypatch.setattr(timing._Clock, "round", noted)
    model = small_model(dropout=0.3)  # whose masks must not depend on who else takes turns
    trainers = {"packed": a_trainer(model), "padded": a_trainer(model, layout="padded")}
    packed, padded = timing.interleave(trainers, 3, 2, 2).values()
    assert order == ["packed", "padded"] * 2
    alone = timing.measure(a_trainer(model), 6, 2)
    assert (packed.losses, packed.counts()) == (alone.losses, alone.counts())
    assert (len(packed.losses), len(packed.step_seconds), len(packed.fetch_seconds)) == (8, 6, 6)
    assert (packed.sequences, packed.targets) == (22, padded.targets)  # two epochs of 11 histories
    assert packed.row_tokens < padded.row_tokens
    assert min(packed.step_seconds) > 0


def test_running_out_of_memory_is_a_row_and_any_other_error_is_an_error(monkeypatch):
    broken = a_trainer()

    def broken_by(error: Exception) -> dict[str, Measurement]:
        monkeypatch.setattr(broken, "_step", lambda *_: (_ for _ in ()).throw(error))
        return timing.interleave({"broken": broken, "whole": a_trainer()}, 2, 1, 1)

    for error in (
        torch.OutOfMemoryError("CUDA out of memory.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError("Unable to allocate"),
    ):
        stopped, whole = broken_by(error).values()
        assert (stopped.status, stopped.reason) == ("oom", str(error).splitlines()[0])
        assert (whole.status, len(whole.step_seconds)) == ("ok", 2)
    with pytest.raises(RuntimeError, match="shapes differ"):
        broken_by(RuntimeError("shapes differ"))
    with pytest.raises((RuntimeError, MemoryError)) as caught:  # the allocator's own
        torch.empty(2**60, dtype=torch.uint8)
    assert timing.is_out_of_memory(caught.value)


def test_an_epoch_is_clocked_whole():
    trainer = a_trainer()
    clock = timing.epoch_clock(trainer)
    assert clock.sequences == len(LENGTHS)
    assert trainer.progress.step == trainer.steps_per_epoch == 3
    assert clock.sequences_per_second == clock.sequences / clock.seconds
    next(loop := trainer.steps())
    loop.close()
    with pytest.raises(ValueError, match="inside an epoch"):
        timing.epoch_clock(trainer)
    with pytest.raises(ValueError, match="raise epochs"):
        timing.measure(a_trainer(epochs=1), 5, 1)


def test_needed_flops_leave_padding_out_and_mfu_is_of_the_peak():
    trainers = [a_trainer(**changes) for changes in ({}, {"layout": "padded"}, {"micro_batch_size": 2})]
    flops = [timing.step_flops(trainer, 1) for trainer in trainers]
    for executed, needed in flops:
        assert needed == flops[0][1]
        assert needed.encoder < executed.encoder
        assert needed.head <= executed.head
    peaks = {("a100", "bf16"): 0.5, ("cpu", "fp32"): None, ("other", "fp16"): None, ("t4", "bf16"): None}
    assert {pair: work.mfu(156e12, 1.0, *pair) for pair in peaks} == peaks  # known only where the peak is


def test_operators_add_up_and_the_trace_is_written(tmp_path: Path, capfd):
    rows = timing.operators(a_trainer(), steps=2, top=5, trace=tmp_path / "trace.json")
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert len(rows) == 6
    assert rows[-1].name == "all others"
    assert [row.seconds for row in rows[:5]] == sorted((row.seconds for row in rows[:5]), reverse=True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"aten::mm", "aten::addmm"} & {event.get("name") for event in events}
    assert "USDT" not in capfd.readouterr().err


def test_the_bound_is_made_of_its_parts(monkeypatch):
    for name in ("product_rate", "copy_rate", "timed"):  # one operation, or one byte, takes a second
        monkeypatch.setattr(bound, name, lambda *_: 1.0)
    for tied in (False, True):
        model = small_model(tied=tied)
        (batch,) = timing.step_batches(a_trainer(model), 1)
        products, rest = bound.gemm_bound(model, batch, torch.device("cpu"))
        assert sum(products.values()) == pytest.approx(work.needed(model, batch).total)
        parameters = sum(p.numel() for p in Bert4Rec(model).parameters())
        moved = {"softmax over the logits": 8 * batch.num_targets * model.num_items}
        moved |= {} if tied else {"clear the input table's gradient": 4 * model.vocab_size * model.hidden_dim}
        assert rest == {"fused AdamW": 1.0} | moved | {"global norm": 4 * parameters}


def test_every_rung_changes_one_field_and_the_last_is_ours():
    model, train = small_model(tied=False), TrainConfig(batch_size=4, precision="fp32")
    rungs = ladder(model, train)
    assert len(rungs) == len(CHANGES) + 1
    for below, above in pairwise(rungs):
        before, after = (vars(rung.model) | vars(rung.train) for rung in (below, above))
        differs = [key for key in before if not key.startswith("_") and before[key] != after[key]]
        assert differs == [above.change.split("=")[0]]
    assert rungs[-1].model == model
    assert rungs[-1].train == train


def test_rungs_of_one_objective_have_one_loss():
    rungs = ladder(small_model(tied=False), TrainConfig(batch_size=4, epochs=50))
    curves = [timing.measure(a_trainer(rung.model, train=rung.train), 2, 1).losses for rung in rungs]
    for curve in curves[3:]:  # from the first without dropout on attention
        np.testing.assert_allclose(curve, curves[2], rtol=1e-4)
    assert abs(curves[0][0] / curves[1][0] - 1) > 1e-3  # another objective


@pytest.mark.slow
@pytest.mark.skipif(not hardware.has_compiler(), reason="no C++ compiler")
def test_compiled_equals_eager_and_nothing_is_compiled_again_over_a_ragged_epoch():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 30, 91)]  # 91 = 11 steps of 8 and 3 more
    compiled, eager = (
        a_trainer(small_model(max_len=24), lengths, batch_size=8, compile_mode=mode)
        for mode in ("default", "off")
    )
    warm = timing.measure(compiled, 6, 6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    rest = timing.measure(compiled, 12 * 2, 0)  # two more epochs, each with its ragged last step
    assert counters["stats"]["unique_graphs"] == graphs, counters["recompiles"]
    losses = warm.losses + rest.losses
    np.testing.assert_allclose(losses, timing.measure(eager, 36, 0).losses, rtol=2e-4)
    assert warm.compile_seconds > 0


def test_what_does_not_apply_is_a_row_with_its_reason():
    small = {"dataset": "synthetic", "synthetic_users": 100, "synthetic_items": 60, "max_len": 12}
    p = smoke("04_amp_compile", **small, steps=2, warmup_steps=1)
    rows = speed.grid(p, speed.dataset_of(p), CPU)
    status = {(row.settings["precision"], row.settings["compile_mode"]): row.measured.status for row in rows}
    assert status == {
        ("fp32", "off"): "ok",
        ("bf16", "off"): "ok",
        ("tf32", "off"): "not applicable",
        **{(name, "reduce-overhead"): "not applicable" for name in p.precisions},
    }
    for row in rows:
        assert bool(row.timings) == (not row.measured.reason) == (row.measured.status == "ok")
    assert {row.settings["head_dtype"] for row in rows if row.measured.status == "ok"} == {"fp32", "bf16"}
    curves = speed.losses(rows)
    np.testing.assert_allclose(curves["bf16"], curves["fp32"], rtol=0.01)


@pytest.mark.slow
def test_a_claimed_gpu_that_is_not_there_is_stated_and_never_recorded_as_measured(tmp_path, monkeypatch):
    """The whole notebook, as papermill runs it with `-p gpu l4`, at less than smoke size."""
    if hardware.probe().label == "l4":
        pytest.skip("this machine has an L4")
    monkeypatch.setenv("RECLIB_RECORDS", str(tmp_path / "executed"))
    p = {"gpu": "l4", "dataset": "synthetic", "steps": 1, "warmup_steps": 1, "repeats": 1}
    p |= {"synthetic_users": 100, "synthetic_items": 60}
    output, here = tmp_path / "04.ipynb", hardware.probe().label
    runner.execute(ROOT / "notebooks/04_amp_compile.ipynb", output, p, records=tmp_path / "executed")
    rows = records.read(tmp_path / "executed")
    assert {row["claimed"] for row in rows} == {"l4"}
    assert {(row["label"], row["kind"]) for row in rows} == {(here, "measured"), ("l4", "predicted")}
    assert {row["own_params"]["basis"] for row in rows if row["label"] == "l4"} == {"unvalidated"}
    assert {row["device"]["label"] for row in rows if row["label"] == here} == {here}
    text = output.read_text()
    assert f"Device: {here}" in text
    assert f"l4 was asked for and is not here: everything measured below is of {here}." in text
    figures = text.count('"application/vnd.plotly.v1+json"')
    assert figures >= 3
    assert text.count("<b>l4 was asked for and is not here</b>") == figures


def test_steps_timed_by_events_are_all_launched_before_the_first_wait():
    launched, waited = [], []

    class Event:
        """An event of a device that takes 5 ms for each step, and is read only when it was waited for."""

        def record(self) -> None:
            self.place = len(launched)

        def synchronize(self) -> None:
            waited.append(self.place)

        def elapsed_time(self, later) -> float:
            assert later.place <= max(waited)
            return 5.0 * (later.place - self.place)

    def step() -> int:
        assert not waited
        launched.append(1)
        return len(launched)

    assert timing.timed_by_events(step, 3, Event) == [(1, 0.005), (2, 0.005), (3, 0.005)]
    assert waited == [3]
