"""Made-up records for tests of figures and findings: no number here was measured."""

from reclib.report import figures


def record(notebook, name, own=None, metrics=None, series=None, **changes):
    row = {"notebook": notebook, "name": name, "kind": "measured", "profile": "quick", "label": "cpu"}
    row |= {"own_params": own or {}, "metrics": metrics or {}, "timings": {}, "series": series or {}}
    row |= {"params": {"epochs": 10, "seed": 0}, "device": {"name": "A processor"}, "seed": None}
    row |= {"data": {"name": "ml-100k", "fingerprint": "abcd"}, "time": "2026-01-02T03:04:05+00:00"}
    row |= {"claimed": "auto", "params_hash": "1", "configuration": {}, "earlier": 0}
    assert changes.keys() <= row.keys()
    return row | changes


def of_grid(name, own, metrics, series=None, seed=None, **changes):
    about = {"profile": "grid", "params": {"grid": "made-up"}, "seed": seed}
    about |= {"data": {"name": "made-up", "fingerprint": "abcd"}}
    return record("02_baseline", name, own, metrics, series, **about | changes)


def ends(name, value, below, above=None):
    above = below if above is None else above
    return {name: value, f"{name}_low": value - below, f"{name}_high": value + above}


def compared(model, difference, p=0.001, seeds=3, name="comparison", reference_seeds=3, **own):
    """A comparison of a model with BERT4Rec by NDCG@10, unless `own` names others."""
    own = {"model": model, "against": "bert4rec", "metric": "ndcg@10"} | own
    numbers = ends("difference", difference, 0.01) | {"p": p, "adjusted_p": p, "detectable": 0.02}
    return of_grid(name, own, numbers | {"seeds": seeds, "reference_seeds": reference_seeds})


def title(name, *records):
    return figures.show(name, *records).layout.title.text


def of_sizes():
    """Two sizes of a grid, a test result of one, and of counts, one with what the model did not have."""
    rows = []
    for model, size, value in (("w32d2", 25_000, 0.03), ("w64d2", 100_000, 0.05)):
        for seed in (0, 1):
            numbers = {"non_embedding": size, "valid_ndcg@10": value + 0.01 * seed, "lowest_valid_loss": 6.0}
            numbers |= {"training_flops": 6e6 * size, "trained_tokens": 10**6}
            rows.append(of_grid("learning_curve", {"model": model}, numbers, {"epoch": [1]}, seed))
    tests = {"w64d2": 0.04, "markov": 0.06, "ease": 0.01, "pairwise_counts_with_validation": 0.09}
    for model, value in tests.items():
        rows.append(of_grid("test_metrics", {"model": model}, ends("ndcg@10", value, 0.005)))
    data = {"name": "scaling-made-up", "fingerprint": "efgh", "interactions": 9}
    return [row | {"notebook": "03_scaling", "data": data} for row in rows]
