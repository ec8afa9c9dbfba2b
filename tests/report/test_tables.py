import pytest

from reclib.report import tables

XEON = {"name": "Intel(R) Xeon(R) Processor", "type": "cpu", "threads": 2}


def step(size="85m", device="cpu2", seconds=0.5, profile="quick", time="2026-01-01", **changes):
    own = {"size": size, "device": device, "rule": "closed", "precision": "fp32", "batch_size": 64}
    whole = {"notebook": "06_hardware", "name": "hardware_step", "kind": "measured", "profile": profile}
    whole |= {"label": device.rstrip("12"), "device": XEON, "own_params": own, "time": time, "seed": None}
    whole |= {"params": {"max_len": 50, "mean_len": 9.4, "batch_size": 64, "size": size}}
    whole |= {"metrics": {"flops": 10**11}, "timings": {"step_seconds": seconds}, "data": {"name": "some"}}
    return whole | changes


def test_a_device_is_a_cpu_by_its_threads_and_generation_or_a_board_by_its_memory():
    known = {"device": XEON | {"cpu_model": "Intel Xeon 6/207"}}
    a100 = {"name": "NVIDIA A100", "type": "cuda"}
    small, large = (a100 | {"memory_bytes": size * 2**30} for size in (39.6, 79.2))
    for record, name in (
        (step(), "cpu2 Intel Xeon"),
        (step(device="cpu1") | known, "cpu1 Intel Xeon 6/207"),
        (tables.placed(step(device="cpu1") | known), "cpu1 Intel Xeon 6/207"),
        (step(own_params={}, label="cpu"), "cpu2 Intel Xeon"),
        (step(device="a100") | {"device": small}, "a100-40"),
        (step(device="a100") | {"device": large}, "a100-80"),
        (step(device="other") | {"device": large}, "other"),
    ):
        assert tables.device_of(record) == name


def test_fresh_steps_come_before_recorded_ones_and_smoke_runs_do_not_come():
    fresh = [step(seconds=0.1, profile="smoke")]
    recorded = [
        step(seconds=0.2),
        step(size="5m", seconds=0.3, profile="smoke"),
        step(size="130m", seconds=0.4, time="2026-01-01"),
        step(size="130m", seconds=0.6, time="2026-01-02"),
        step(size="430m", kind="predicted"),
    ]
    steps = {r["own_params"]["size"]: r["timings"]["step_seconds"] for r in tables.steps(fresh, recorded)}
    assert steps == {"85m": 0.1, "130m": 0.6}


def test_a_point_of_accuracy_is_only_of_what_was_trained_and_scored():
    def of(name, seed, model="bert4rec", **changes):
        return step(notebook="02_baseline", name=name, own_params={"model": model}) | {"seed": seed} | changes

    records = [of("learning_curve", seed, timings={"train_seconds": 100.0}) for seed in (0, 1, 2)]
    records += [of("test_metrics", seed, metrics={"ndcg@10": 0.05}) for seed in (0, 1)]
    records.append(of("test_metrics", 0, model="never timed", metrics={"ndcg@10": 0.9}))
    (row,) = tables.points(records, {"cpu2": 3.6})
    assert (row["model"], row["seeds"], row["training (s)"]) == ("bert4rec", 2, 100.0)
    assert row["s per 0.01"] == pytest.approx(20.0)
    assert row["cost per 0.01"] == pytest.approx(0.02)


def test_mfu_is_of_boards_of_the_catalogue_alone():
    card = {"name": "NVIDIA L4", "type": "cuda", "memory_bytes": 24 * 2**30}
    on_l4, other = (step(device=name, seconds=0.01) | {"device": card} for name in ("l4", "other"))
    assert tables.mfu_of(on_l4) == pytest.approx(1e11 / 0.01 / 30.3e12)
    assert tables.mfu_of(other) is tables.mfu_of(step()) is None
