"""Records such as notebook 05 writes, for the tests of figures."""

from __future__ import annotations

from typing import Any

from reclib.report.tables import ARM_NAMES

ARMS = list(ARM_NAMES)
BASE = {
    "schema": 1, "notebook": "05_ilora", "kind": "measured", "label": "cpu", "claimed": "auto",
    "profile": "quick", "seed": None, "data": {"name": "ml-100k", "fingerprint": "abcd"}, "timings": {},
    "series": {}, "params": {}, "params_hash": "0", "time": "2026-01-02T03:04:05+00:00",
    "device": {"name": "A processor"},
}  # fmt: skip


def record(name: str, metrics: dict[str, Any], own: dict[str, Any], **more: Any) -> dict[str, Any]:
    return BASE | {"name": name, "metrics": metrics, "own_params": own} | more


def accuracy() -> list[dict[str, Any]]:
    found = []
    for task in ("next_period", "segment"):
        for place, arm in enumerate(ARMS):
            value = 0.05 + 0.001 * place
            numbers = {"ndcg@10": value, "ndcg@10_low": value - 0.01, "ndcg@10_high": value + 0.02}
            share = {"trained_share": 0.01 * place, "trained": 10 * place, "saved_bytes": 99}
            found.append(record("adaptation", numbers | share, {"task": task, "model": arm}))
            found.append(record("adaptation", {"ndcg@10": value}, {"task": task, "model": arm}, seed=0))
    return found


def comparisons(name: str, reference: str, seeds: int = 3) -> list[dict[str, Any]]:
    found = []
    for place, arm in enumerate(one for one in ARMS if one != reference):
        difference = (-0.02, 0.02, 0.001)[place % 3]
        p = (0.01, 0.02, 0.9)[place % 3]
        numbers = {
            "difference": difference, "difference_low": difference - 0.01, "p": p, "adjusted_p": p,
            "difference_high": difference + 0.01, "detectable": 0.015, "seeds": seeds,
            "reference_seeds": seeds,
        }  # fmt: skip
        own = {"task": "next_period", "model": arm, "against": reference}
        found += [record(name, numbers, own | {"metric": metric}) for metric in ("hr@10", "ndcg@10")]
    return found


def steps() -> list[dict[str, Any]]:
    counted = {"trained_bytes": 4096, "trained": 1024, "base": 9999}
    took = {"step_seconds": 0.02, "step_seconds_low": 0.01, "step_seconds_high": 0.04}
    took |= {"peak_tensor_bytes": 2**21}
    of_ilora = {"over_lora": 1.25, "over_lora_low": 1.2, "over_lora_high": 1.5, "over_full": 0.8}
    rows = []
    for model, precision, mode, more in (
        ("ilora", "bf16", "default", of_ilora | {"over_ilora": 0.5, "over_lora": 9.0}),
        ("ilora", "fp32", "off", of_ilora),
        ("full", "fp32", "off", {}),
    ):
        own = {"model": model, "precision": precision, "compile_mode": mode, "status": "ok", "reason": ""}
        rows.append(record("adapter_step", counted, own, timings=took | more))
    own = {"model": "ilora", "precision": "fp32", "compile_mode": "reduce-overhead", "reason": "no"}
    rows.append(record("adapter_step", {}, own | {"status": "not applicable"}))
    return rows


def gates(task: str = "next_period") -> list[dict[str, Any]]:
    series = {
        "expert 1": [0.2, 0.4, 0.6], "expert 2": [0.8, 0.6, 0.4], "items in the history": [3.0, 9.0, 5.0],
        "NDCG@10 minus that of lora": [0.0, 0.1, -0.1],
    }  # fmt: skip
    return [record("gates", {"users": 3}, {"task": task}, series=series, seed=0)]


def correlations() -> list[dict[str, Any]]:
    values = {("items in the history", 1): -0.9, ("items in the history", 2): 0.3}
    own = {"task": "next_period"}
    return [
        record(
            "gate_correlation",
            {"spearman": value, "adjusted_p": 0.01 if abs(value) > 0.5 else 0.2},
            own | {"feature": feature, "expert": expert},
            seed=0,
        )
        for (feature, expert), value in values.items()
    ]


def everything() -> list[dict[str, Any]]:
    """What all figures of adapters need."""
    compared = comparisons("gate_comparison", "ilora") + comparisons("adaptation_gain", "none")
    return accuracy() + compared + steps() + gates() + correlations()
