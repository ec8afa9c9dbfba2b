"""Made-up records of every figure: no number here was measured."""

import itertools

from reclib.report.tables import ARM_NAMES

MODELS = {  # made-up HR@10
    "bert4rec": 0.31,
    "causal": 0.33,
    "popularity": 0.04,
    "recent_popularity": 0.06,
    "markov": 0.21,
    "item_knn": 0.16,
    "ease": 0.24,
}
TRAINED = ("bert4rec", "causal")


def record(notebook, name, own=None, metrics=None, series=None, **changes):
    made = {
        "notebook": notebook,
        "name": name,
        "kind": "measured",
        "profile": "quick",
        "label": "cpu",
        "metrics": metrics or {},
        "timings": {},
        "params": {"epochs": 10, "seed": 0},
        "own_params": own or {},
        "series": series or {},
        "device": {"name": "A processor"},
        "seed": None,
        "data": {"name": "ml-100k", "fingerprint": "abcd"},
        "time": "2026-01-02T03:04:05+00:00",
        "claimed": "auto",
        "params_hash": "1",
        "configuration": {},
        "earlier": 0,
    }
    assert changes.keys() <= made.keys()
    return made | changes


def of_grid(name, own, metrics, series=None, seed=None, **changes):
    about = {"profile": "grid", "params": {"grid": "made-up"}, "seed": seed}
    about |= {"data": {"name": "made-up", "fingerprint": "abcd"}}
    return record("02_baseline", name, own, metrics, series, **about | changes)


def ends(name, value, below, above=None):
    above = below if above is None else above
    return {name: value, f"{name}_low": value - below, f"{name}_high": value + above}


# -- notebook 02 -----------------------------------------------------------------------------------------


def curves(models=TRAINED, seeds=(0, 1, 2)):
    found = []
    for place, model in enumerate(models):
        for seed in seeds:
            epochs = list(range(5, 45 + 20 * (place == 0), 5))
            valid = [0.01 * seed + (0.15 + 0.02 * place) * (1 - 0.8 ** (e / 5)) for e in epochs]
            series = {"epoch": epochs, "train_loss": [7 - e / 30 for e in epochs], "valid_ndcg@10": valid}
            found.append(of_grid("learning_curve", {"model": model}, {}, series, seed))
    return found


def scores():
    found = []
    for model, hr in MODELS.items():
        metrics = ends("hr@10", hr, 0.011) | ends("ndcg@10", hr / 2, 0.007) | ends("mrr", hr / 2.4, 0.006)
        found.append(of_grid("test_metrics", {"model": model}, metrics))
        for seed in range(3) if model in TRAINED else ():
            single = {"hr@10": hr + 0.004 * (seed - 1), "ndcg@10": hr / 2, "mrr": hr / 2.4}
            found.append(of_grid("test_metrics", {"model": model}, single, seed=seed))
    return found


def comparisons(**changes):
    found = []
    for metric, scale in (("hr@10", 1.0), ("ndcg@10", 0.5)):
        for model, hr in MODELS.items():
            if model != "bert4rec":
                difference = scale * (hr - MODELS["bert4rec"])
                p = 0.2 if model == "causal" else 0.001
                numbers = {"p": p, "adjusted_p": p, "detectable": scale * 0.022, "reference_seeds": 3}
                numbers |= {"seeds": 3 if model in TRAINED else 0}
                numbers |= ends("difference", difference, scale * 0.015)
                own = {"model": model, "against": "bert4rec", "metric": metric}
                found.append(of_grid("comparison", own, numbers | changes))
    return found


def protocols():
    ways = {
        "leave-one-out, seen removed": (1.0, True),
        "leave-one-out, seen kept": (0.8, True),
        "leave-one-out, 100 uniform": (2.4, False),
        "leave-one-out, 100 popularity": (1.6, False),
        "seed study's": (1.2, False),
    }
    found = []
    for (model, hr), (name, (factor, comparable)) in itertools.product(MODELS.items(), ways.items()):
        if name != "seed study's" or model == "bert4rec":
            own = {"model": model, "protocol": name, "label": f"{name}: made up", "comparable": comparable}
            found.append(of_grid("protocol", own, ends("hr@10", factor * hr, 0.012)))
    for split, seed in itertools.product(("global time", "random users"), range(3)):
        name = f"{split}, seen removed"
        own = {"model": "bert4rec", "protocol": name, "label": f"{name}: made up", "comparable": True}
        found.append(of_grid("protocol", own, ends("hr@10", 0.05 + 0.01 * seed, 0.01), seed=seed))
    return found


def shuffle_controls():
    found = []
    for model, hr in MODELS.items():
        lost = {"bert4rec": 0.5, "causal": 0.6, "markov": 0.7}.get(model, 0.0)
        true, part = hr / 2, hr / 2 * (1 - lost / 3)
        metrics = {"ndcg@10": true, "shuffled": true * (1 - lost), "shuffled_but_last": part}
        metrics |= ends("shuffled_change", -true * lost, 0.004)
        metrics |= ends("shuffled_but_last_change", part - true, 0.004)
        found.append(of_grid("shuffle_control", {"model": model}, metrics))
    return found


def groups():
    labels = {
        "history": ["below 10", "10 or more"],
        "popularity": ["items with 0% to 100% of interactions", "items not in training"],
    }
    found = []
    for (model, hr), (by, names) in itertools.product(MODELS.items(), labels.items()):
        values = [1.6 * hr * 0.55**place for place in range(len(names))]
        series = {"group": names, "users": [900, 140], "hr@10": values}
        series |= {"hr@10_low": [0.9 * v for v in values], "hr@10_high": [1.1 * v for v in values]}
        found.append(of_grid("groups", {"model": model, "by": by}, {"groups": len(names)}, series))
    return found


def beyond():
    return [
        of_grid(
            "beyond_accuracy",
            {"model": model, "k": 10},
            {"coverage": 2 * hr, "gini": 1 - 1.5 * hr, "popularity_percentile": 0.99 - hr / 2},
        )
        for model, hr in MODELS.items()
    ]


ARMS = {
    "no output bias": -0.004,
    "untied tables": -0.011,
    "twice the width": 0.006,
    "last window only": 0.0005,
}
ARMS |= {"popular negatives without logQ": -0.05, "positions counted back from the last item": 0.002}


def arms(seeds=3):
    base = {"base": 0.1, "seeds": seeds}
    return [
        of_grid(
            "validation_difference",
            {"model": model, "against": "base"},
            base
            | ends("difference", d, 0.0015)
            | {"value": 0.1 + d, "seed_low": d - 0.002, "seed_high": d + 0.001},
            data={"name": "ablations-made-up", "fingerprint": "abcd"},
        )
        for model, d in ARMS.items()
    ]


def races():
    found = []
    for place, model in enumerate(("BERT4Rec (ours)", "BERT4Rec (RecTools)", "BERT4Rec (RePlay)")):
        values = [(0.16 - 0.03 * place) * (1 - 0.6**m) for m in (1, 2, 5, 10, 20)]
        series = {"minutes": [1, 2, 5, 10, 20], "ndcg@10": values}
        series |= {f"ndcg@10_{end}": [v + d for v in values] for end, d in (("low", -0.005), ("high", 0.005))}
        found.append(of_grid("equal_time", {"model": model}, {}, series))
    return found


EVERY = {
    "learning_curves": curves,
    "metric_comparison": scores,
    "comparison": comparisons,
    "ablation": arms,
    "equal_time": races,
    "protocols": protocols,
    "shuffle_control": shuffle_controls,
    "groups": groups,
    "beyond_accuracy": beyond,
}


# -- notebook 04 -----------------------------------------------------------------------------------------


def speed():
    """Two variants that ran, one that does not apply, one without room; three rungs; operators; losses."""
    found = []
    for precision, mode, status, seconds in (
        ("fp32", "off", "ok", 0.020),
        ("fp32", "default", "ok", 0.016),
        ("bf16", "off", "oom", None),
        ("tf32", "off", "not applicable", None),
    ):
        own = {"precision": precision, "compile_mode": mode, "batch_size": 64, "status": status}
        timings = {}
        if seconds is not None:
            own["ran_compile_mode"] = mode
            timings = ends("step_seconds", seconds, 0.1 * seconds, 0.2 * seconds)
            timings |= {"sequences_per_second": 64 / seconds, "peak_tensor_bytes": 5 * 2**20}
            timings |= {"compile_seconds": 0.0 if mode == "off" else 8.0}
            timings |= {"break_even_steps": None if mode == "off" else 2000}
        found.append(record("04_amp_compile", "step", own, timings=timings))
    for rung, (name, seconds) in enumerate((("seed study's step", 0.5), ("packed", 0.02), ("AMP", 0.04))):
        own = {"rung": rung, "name": name, "change": f"field={rung}", "status": "ok"}
        found.append(record("04_amp_compile", "ladder", own, timings={"step_seconds": seconds}))
    series = {"operator": ["mm", "all others"], "calls": [3.0, 9.0], "seconds": [0.01, 0.03]}
    found.append(record("04_amp_compile", "operators", series=series | {"share": [0.25, 0.75]}))
    for number, name in enumerate(("fp32", "bf16")):
        losses = {"step": [1, 2], "loss": [7.0, 6.0 + 0.06 * number]}
        own = {"precision": name, "number": number}
        found.append(record("04_amp_compile", "loss_curve", own, series=losses))
    return found


# -- notebook 03 -----------------------------------------------------------------------------------------


def scaling():
    """Runs of two widths, what a law fitted to them predicts of a third, and the trials of a tuning."""
    found = []
    for model, size, loss in (("w32d2", 25_000, 6.4), ("w64d2", 100_000, 6.3)):
        numbers = {"non_embedding": size, "item_tables": 10 * size, "training_flops": 6e6 * size}
        numbers |= {"trained_tokens": 10**6, "lowest_valid_loss": loss, "valid_ndcg@10": 0.07}
        found.append(record("03_scaling", "learning_curve", {"model": model}, numbers))
    law = {"floor": 5.6, "factor": 3.4, "exponent": 0.14} | ends("predicted", 6.0, 0.1)
    law |= {"low": 5.9, "high": 6.1, "without_low": None, "without_high": None}
    own = {"of": "w384d2", "size": 3_500_000, "seeds": 3}
    found.append(record("03_scaling", "prediction", own, law))
    for trial, (rate, value) in enumerate(((1e-4, 0.1), (1e-2, 0.2))):
        own, numbers = {"trial": trial, "state": "complete"}, {"learning_rate": rate, "valid_ndcg@10": value}
        found.append(record("03_scaling", "trial", own, numbers))
    shares = {"field": ["learning_rate", "dropout"], "share": [0.8, 0.2]}
    return [*found, record("03_scaling", "tuning", series=shares)]


def of_sizes():
    """Two sizes of a grid, a test result of one, and of counts, one with what the model did not have."""
    found = []
    for model, size, value in (("w32d2", 25_000, 0.03), ("w64d2", 100_000, 0.05)):
        for seed in (0, 1):
            numbers = {"non_embedding": size, "valid_ndcg@10": value + 0.01 * seed, "lowest_valid_loss": 6.0}
            numbers |= {"training_flops": 6e6 * size, "trained_tokens": 10**6}
            found.append(of_grid("learning_curve", {"model": model}, numbers, {"epoch": [1]}, seed))
    tests = {"w64d2": 0.04, "markov": 0.06, "ease": 0.01, "pairwise_counts_with_validation": 0.09}
    for model, value in tests.items():
        found.append(of_grid("test_metrics", {"model": model}, ends("ndcg@10", value, 0.005)))
    data = {"name": "scaling-made-up", "fingerprint": "efgh", "interactions": 9}
    return [one | {"notebook": "03_scaling", "data": data} for one in found]


# -- notebook 05 -----------------------------------------------------------------------------------------


def adapted():
    found = []
    for task, (place, arm) in itertools.product(("next_period", "segment"), enumerate(ARM_NAMES)):
        numbers = ends("ndcg@10", 0.05 + 0.001 * place, 0.01, 0.02)
        share = {"trained_share": 0.01 * place, "trained": 10 * place, "saved_bytes": 99}
        own = {"task": task, "model": arm}
        found.append(record("05_ilora", "adaptation", own, numbers | share))
        found.append(record("05_ilora", "adaptation", own, {"ndcg@10": numbers["ndcg@10"]}, seed=0))
    return found


def gate_comparisons(name, reference, seeds=3):
    found = []
    for place, arm in enumerate(arm for arm in ARM_NAMES if arm != reference):
        p = (0.01, 0.02, 0.9)[place % 3]
        numbers = ends("difference", (-0.02, 0.02, 0.001)[place % 3], 0.01) | {"p": p, "adjusted_p": p}
        numbers |= {"detectable": 0.015, "seeds": seeds, "reference_seeds": seeds}
        own = {"task": "next_period", "model": arm, "against": reference}
        both = [own | {"metric": metric} for metric in ("hr@10", "ndcg@10")]
        found += [record("05_ilora", name, each, numbers) for each in both]
    return found


def adapter_steps():
    counted = {"trained_bytes": 4096, "trained": 1024, "base": 9999}
    took = ends("step_seconds", 0.02, 0.01, 0.02) | {"peak_tensor_bytes": 2**21}
    of_ilora = {"over_lora": 1.25, "over_lora_low": 1.2, "over_lora_high": 1.5, "over_full": 0.8}
    rows = []
    for model, precision, mode, more in (
        ("ilora", "bf16", "default", of_ilora | {"over_ilora": 0.5, "over_lora": 9.0}),
        ("ilora", "fp32", "off", of_ilora),
        ("full", "fp32", "off", {}),
    ):
        own = {"model": model, "precision": precision, "compile_mode": mode, "status": "ok", "reason": ""}
        rows.append(record("05_ilora", "adapter_step", own, counted, timings=took | more))
    own = {"model": "ilora", "precision": "fp32", "compile_mode": "reduce-overhead", "reason": "no"}
    return [*rows, record("05_ilora", "adapter_step", own | {"status": "not applicable"})]


def gates(task="next_period"):
    series = {"expert 1": [0.2, 0.4, 0.6], "expert 2": [0.8, 0.6, 0.4]}
    series |= {"items in the history": [3.0, 9.0, 5.0], "NDCG@10 minus that of lora": [0.0, 0.1, -0.1]}
    return [record("05_ilora", "gates", {"task": task}, {"users": 3}, series, seed=0)]


def adapters():
    compared = gate_comparisons("gate_comparison", "ilora") + gate_comparisons("adaptation_gain", "none")
    implanted = [
        one for one in gate_comparisons("implanted", "ilora") if one["own_params"]["model"] == "lora"
    ]
    for one in implanted:
        one["own_params"] |= {"share": 0.5, "targets": "all matrices"}
    return adapted() + compared + implanted + adapter_steps() + gates()


# -- notebooks 06 to 08 ----------------------------------------------------------------------------------


def hardware():
    """One size on two devices of this machine, what two techniques give, and a run's plans."""
    found = []
    for device, seconds in (("cpu1", 0.5), ("cpu2", 0.3)):
        own = {"size": "85m", "device": device, "rule": "closed", "precision": "fp32", "basis": "measured"}
        timings = ends("sequences_per_second", 128 / seconds, 20)
        timings |= {"step_seconds": seconds, "peak_memory_bytes": 3 * 2**30}
        work = {"flops": 10**11, "bytes_moved": 10**10}
        found.append(record("06_hardware", "hardware_step", own, work, timings=timings))
        # A long measurement, drawn beside them.
        own = {"size": "85m", "device": device, "cpu": "Some CPU 1/2", "batch_size": 128, "max_len": 50}
        timings = {"step_seconds": 0.4, "sequences_per_second": 320.0, "peak_memory_bytes": 2**31}
        work = {"encoder_flops": 10**10, "head_flops": 10**11}
        own |= {"mean_len": 9.4}
        found.append(record("06_hardware", "real_size_step", own, work, timings=timings))
    for technique, speedup in (("packed rows", 1.5), ("gather before the head", 9.0)):
        own = {"size": "85m", "device": "cpu1", "technique": technique, "basis": "validated"}
        found.append(record("06_hardware", "technique", own, timings={"speedup": speedup}))
    for device, basis, seconds in (("l4", "unvalidated", 50.0), ("cpu1", "validated", 4000.0)):
        own = {"size": "85m", "batch_size": 512, "device": device, "precision": "fp32", "basis": basis}
        timings, fits = ends("epoch_seconds", seconds, 0.2 * seconds), {"fits": 1} if device == "l4" else {}
        series = {"part": ["weights", "activations"], "bytes": [2**30, 2**31]}
        own |= {"status": "ok"}
        found.append(record("07_explore", "plan", own, fits, series, timings=timings))
    return found


def audit():
    """A rate that the epoch time rules out, one that it allows, and the count of all verdicts."""
    rates = {"85 M": (2.5, 400.0), "T4": (1.0, 90.0)}
    numbers = {name: {"ratio": r, "by_clock_per_second": allowed} for name, (r, allowed) in rates.items()}
    found = [record("08_audit", "audit_rates", {"model": name}, m) for name, m in numbers.items()]
    return [*found, record("08_audit", "audit_verdicts", metrics={"holds": 2, "contradicted": 5})]
