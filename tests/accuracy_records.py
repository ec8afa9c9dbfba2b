"""Made-up records of accuracy: no number here was measured."""

import itertools

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


def record(name, own, metrics, series=None, seed=None, **changes):
    made = {
        "notebook": "02_baseline",
        "name": name,
        "kind": "measured",
        "profile": "grid",
        "label": "cpu",
        "metrics": metrics,
        "timings": {},
        "params": {"grid": "made-up"},
        "own_params": own,
        "series": series or {},
        "device": {"name": "A processor"},
        "seed": seed,
        "data": {"name": "made-up", "fingerprint": "abcd"},
        "time": "2026-01-02T03:04:05+00:00",
    }
    assert changes.keys() <= made.keys()
    return made | changes


def ends(name, value, width):
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


def curves(models=TRAINED, seeds=(0, 1, 2)):
    found = []
    for place, model in enumerate(models):
        for seed in seeds:
            epochs = list(range(5, 45 + 20 * (place == 0), 5))
            valid = [0.01 * seed + (0.15 + 0.02 * place) * (1 - 0.8 ** (e / 5)) for e in epochs]
            series = {"epoch": epochs, "train_loss": [7 - e / 30 for e in epochs], "valid_ndcg@10": valid}
            found.append(record("learning_curve", {"model": model}, {}, series, seed))
    return found


def scores():
    found = []
    for model, hr in MODELS.items():
        metrics = ends("hr@10", hr, 0.011) | ends("ndcg@10", hr / 2, 0.007) | ends("mrr", hr / 2.4, 0.006)
        found.append(record("test_metrics", {"model": model}, metrics))
        for seed in range(3) if model in TRAINED else ():
            single = {"hr@10": hr + 0.004 * (seed - 1), "ndcg@10": hr / 2, "mrr": hr / 2.4}
            found.append(record("test_metrics", {"model": model}, single, seed=seed))
    return found


def comparisons(**changes):
    found = []
    for metric, scale in (("hr@10", 1.0), ("ndcg@10", 0.5)):
        for model, hr in MODELS.items():
            if model != "bert4rec":
                difference = scale * (hr - MODELS["bert4rec"])
                p = 0.2 if model == "causal" else 0.001
                numbers = {"p": p, "adjusted_p": p, "detectable": scale * 0.022, "reference_seeds": 3}
                numbers |= {"seeds": 3 if model in TRAINED else 0} | ends(
                    "difference", difference, scale * 0.015
                )
                own = {"model": model, "against": "bert4rec", "metric": metric}
                found.append(record("comparison", own, numbers | changes))
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
            found.append(record("protocol", own, ends("hr@10", factor * hr, 0.012)))
    for split, seed in itertools.product(("global time", "random users"), range(3)):
        name = f"{split}, seen removed"
        own = {"model": "bert4rec", "protocol": name, "label": f"{name}: made up", "comparable": True}
        found.append(record("protocol", own, ends("hr@10", 0.05 + 0.01 * seed, 0.01), seed=seed))
    return found


def shuffle_controls():
    found = []
    for model, hr in MODELS.items():
        lost = {"bert4rec": 0.5, "causal": 0.6, "markov": 0.7}.get(model, 0.0)
        true, part = hr / 2, hr / 2 * (1 - lost / 3)
        metrics = {"ndcg@10": true, "shuffled": true * (1 - lost), "shuffled_but_last": part}
        metrics |= ends("shuffled_change", -true * lost, 0.004)
        metrics |= ends("shuffled_but_last_change", part - true, 0.004)
        found.append(record("shuffle_control", {"model": model}, metrics))
    return found


def groups():
    labels = {
        "history": ["below 10", "10 to 19", "20 to 49", "50 to 99", "100 or more"],
        "popularity": [
            *(
                f"items with {a} to {b} of interactions"
                for a, b in itertools.pairwise(("0%", "20%", "50%", "80%"))
            ),
            "items with 80% to 100% of interactions",
            "items not in training",
        ],
    }
    found = []
    for (model, hr), (by, names) in itertools.product(MODELS.items(), labels.items()):
        values = [1.6 * hr * 0.55**place for place in range(len(names))]
        series = {"group": names, "users": [900, 1500, 2400, 1100, 140][: len(names)], "hr@10": values}
        series |= {"hr@10_low": [0.9 * v for v in values], "hr@10_high": [1.1 * v for v in values]}
        found.append(record("groups", {"model": model, "by": by}, {"groups": len(names)}, series))
    return found


def beyond():
    return [
        record(
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
        record(
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
        found.append(record("equal_time", {"model": model}, {}, series))
    return found


def histograms():
    series = {"rank_low": [1, 2, 3], "rank_high": [1, 2, 5], "users": [5, 3, 2]}
    return [record("rank_histogram", {"model": model}, {}, series) for model in TRAINED]


EVERY = {
    "learning_curves": curves,
    "metric_comparison": scores,
    "comparison": comparisons,
    "rank_histogram": histograms,
    "ablation": arms,
    "equal_time": races,
    "protocols": protocols,
    "shuffle_control": shuffle_controls,
    "groups": groups,
    "beyond_accuracy": beyond,
}
