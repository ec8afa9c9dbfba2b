"""Figures, tables and findings of accuracy and of adapters: what is drawn is what the records say."""

from collections import defaultdict

from figure_records import compared, ends, of_grid, record, title

from reclib.evaluate import statistics
from reclib.report import figures, findings, style, tables
from reclib.report.tables import ARM_NAMES


def colors(figure):
    """Return the colours of the marks of each named row."""
    by_row = defaultdict(set)
    for trace in figure.data:
        if trace.type == "scatter" and "lines" not in (trace.mode or ""):
            for name in trace.y:
                by_row[name.replace("<br>", " ")].add(trace.marker.color)
    return by_row


def curve(model, seed, *valid):
    series = {"epoch": [1, 2, 3], "train_loss": [7.0, 6.0, 5.5], "valid_ndcg@10": valid}
    return of_grid("learning_curve", {"model": model}, {}, series, seed)


def test_learning_curves_name_the_best_model_by_its_mean_over_seeds():
    twin = [curve("causal", seed, 0.1, 0.14 + 0.01 * seed, 0.14) for seed in (0, 1, 2)]
    lucky = [curve("bert4rec", 0, 0.1, 0.1, 0.17), curve("bert4rec", 1, 0.1, 0.1, 0.1)]
    best = "Causal twin is best on validation: NDCG@10 0.150, mean of 3 seeds"
    assert title("learning_curves", *lucky, *twin) == best
    assert title("learning_curves", twin[2]) == "NDCG@10 on validation is best after 2 epochs"


def test_every_comparison_says_what_may_be_claimed():
    rows = [compared("ease", -0.07, seeds=0), compared("markov", 0.05, 0.01), compared("causal", 0.02, 0.2)]
    figure = figures.show("comparison", *rows, compared("popularity", -0.2, seeds=1))
    claims = {a.y: a.text for a in figure.layout.annotations if a.xref == "x"}
    expected = {"EASE": "worse", "Markov chain": "better", "causal twin": "not separated"}
    assert claims == expected | {"popularity": "too few seeds"}
    assert figure.layout.title.text == (
        "Against BERT4Rec, NDCG@10 of 4 models: 1 worse, 1 better, 1 not separated, 1 of too few seeds"
    )
    few = title("comparison", compared("ease", -0.07, seeds=0, reference_seeds=1))
    assert few.endswith("of 1 models: no claim, with fewer than 3 seeds")


def test_order_matters_only_where_the_interval_says_so():
    def control(model, change, beyond):
        metrics = {"ndcg@10": 0.1, "shuffled": 0.1 + change, "shuffled_but_last": 0.1}
        metrics |= ends("shuffled_change", change, beyond) | ends("shuffled_but_last_change", 0.0, 0.01)
        return of_grid("shuffle_control", {"model": model}, metrics)

    rows = [control("markov", -0.07, 0.01), control("causal", -0.05, 0.01), control("ease", -0.01, 0.02)]
    expected = "Order matters for 2 of 3 models, most for Markov chain: shuffled it loses 70%"
    assert title("shuffle_control", *rows) == expected
    assert title("shuffle_control", rows[2]).startswith("Order matters for none")


def test_arms_are_sorted_and_coloured_by_their_interval_and_few_seeds_carry_no_claim():
    expected = {  # change of NDCG@10, and the colour that its interval of ± 0.0015 allows
        "twice the width": (0.006, style.GREEN),
        "last window only": (0.0005, style.MUTED),
        "untied tables": (-0.011, style.ORANGE),
        "popular negatives without logQ": (-0.05, style.ORANGE),
    }

    def ablation(seeds):
        rows = []
        for model, (difference, _) in reversed(expected.items()):
            numbers = ends("difference", difference, 0.0015) | {"base": 0.1, "seeds": seeds, "value": 0.1}
            numbers |= {"seed_low": difference - 0.002, "seed_high": difference + 0.001}
            own = {"model": model, "against": "base"}
            rows.append(of_grid("validation_difference", own, numbers))
        return figures.show("ablation", *rows)

    figure = ablation(statistics.MIN_SEEDS)
    assert [name.replace("<br>", " ") for name in figure.layout.yaxis.categoryarray] == list(expected)
    assert colors(figure) == {name: {color} for name, (_, color) in expected.items()}
    assert figure.layout.title.text == "Of 4 changes to “base”, 1 raise NDCG@10, 2 lower it"
    assert "0: base, NDCG@10 0.1000" in figure.layout.title.subtitle.text
    figure = ablation(statistics.MIN_SEEDS - 1)
    assert set.union(*colors(figure).values()) == {style.MUTED}
    assert figure.layout.title.text == "4 changes to “base”, of fewer seeds than a claim needs"


def test_the_fastest_learner_is_said_to_lead_only_where_it_does():
    def races(*first, spread=0.0):
        rows = []
        for model, values in (("BERT4Rec (ours)", first), ("BERT4Rec (RecTools)", (0.05, 0.13))):
            series = {"minutes": [1, 20], "ndcg@10": list(values)}
            for end, sign in (("low", -1), ("high", 1)):
                series[f"ndcg@10_{end}"] = [value + sign * spread for value in values]
            rows.append(of_grid("equal_time", {"model": model}, {}, series))
        return title("equal_time", *rows)

    assert races(0.06, 0.16) == "BERT4Rec (ours) leads at every time: in the end 0.160 against 0.130"
    assert races(0.0, 0.16).startswith("BERT4Rec (ours) leads after 20 minutes:")
    unclear = races(0.0, 0.16, spread=0.02)
    assert unclear == "BERT4Rec (ours) is not told apart from BERT4Rec (RecTools) after 20 minutes"


def test_the_table_shows_the_newest_scoring_with_its_seeds():
    def scored(model, value, seed=None, **changes):
        metrics = ends("hr@10", value, 0.1) | ends("ndcg@10", value, 0.1) | ends("mrr", value, 0.1)
        return of_grid("test_metrics", {"model": model}, metrics, seed=seed, **changes)

    rows = [scored("bert4rec", 0.3, seed, time="2026-03-01") for seed in (0, 1, 2, 3)]
    rows += [scored("bert4rec", 0.3, time="2026-01-01"), scored("bert4rec", 0.5, time="2026-02-01")]
    rows += [scored("ease", 0.2), compared("ease", -0.07, 0.001, seeds=0)]
    table = tables.accuracy(rows)
    assert table["HR@10"].tolist() == ["0.5000 (0.4000 to 0.6000)", "0.2000 (0.1000 to 0.3000)"]
    assert table["seeds"].to_dict() == {("made-up", "BERT4Rec"): "4", ("made-up", "EASE"): ""}
    (row,) = tables.differences(rows, "comparison").values.tolist()
    assert row == ["BERT4Rec", "NDCG@10", "-0.0700 (-0.0800 to -0.0600)", "no and 3", 0.001, 0.02]
    assert tables.differences(rows, "peer_comparison").empty


def test_the_answer_of_a_comparison_says_no_more_than_its_claims():
    rows = []
    for name, value in {"bert4rec": 0.2, "ease": 0.15, "markov": 0.25, "causal": 0.21}.items():
        metrics = ends("ndcg@10", value, 0.01) | {"hr@10": value}
        rows.append(of_grid("test_metrics", {"model": name}, metrics))
    ease, markov = compared("ease", -0.05, 0.01, 0), compared("markov", 0.05, 0.01, 0)

    def answer(*comparisons):
        return findings.sentences("02_baseline", [*rows, *comparisons, compared("causal", 0.01, 0.3)])[0]

    own = "BERT4Rec 0.200 [0.190, 0.210], 3 seeds (NDCG@10)"
    last = "causal twin 0.210: not separated."
    assert answer(ease) == (
        f"Yes on made-up (cpu): {own}, beats every count scored, the best of them EASE 0.150. {last}"
    )
    assert answer(ease, markov) == (
        f"No on made-up (cpu): Markov chain 0.250 beats {own}; BERT4Rec beats EASE 0.150. {last}"
    )
    few = answer(compared("ease", -0.05, 0.01, 1))
    assert few.startswith(f"Not shown on made-up (cpu): {own}, is not told apart from every count")
    assert "too few seeds: EASE 0.150" in few
    assert answer().startswith(f"On made-up (cpu) {own}; no count was compared")


# -- adapters ------------------------------------------------------------------------------------------------


def gate(model, difference, p=0.001, seeds=3):
    own = {"against": "ilora", "task": "next_period"}
    row = compared(model, difference, p, seeds, "gate_comparison", reference_seeds=seeds, **own)
    return row | {"notebook": "05_ilora"}


ALIKE = [gate("lora", 0.001, 0.9), gate("fixed_gate", 0.001, 0.9)]
GATES = [gate("none", -0.02), gate("full", 0.02), gate("noise", -0.02), *ALIKE]


def test_gates_are_coloured_and_counted_by_their_claims():
    figure = figures.show("gate_comparison", *GATES)
    assert figure.layout.title.text.endswith("next period: of 5 arms 2 worse, 1 better, 2 not separated")
    arms = dict.fromkeys(("none", "noise"), style.ORANGE) | {"full": style.GREEN}
    arms |= dict.fromkeys(("lora", "fixed_gate"), style.MUTED)
    assert colors(figure) == {ARM_NAMES[arm]: {color} for arm, color in arms.items()}
    figure = figures.show("gate_comparison", gate("full", 0.02, seeds=1))
    assert figure.layout.title.text.endswith("of 1 arms no claim, with fewer than 3 seeds")
    assert colors(figure) == {ARM_NAMES["full"]: {style.MUTED}}


def test_the_findings_say_whether_the_gate_helps_and_what_it_costs():
    own = {"model": "ilora", "precision": "fp32", "compile_mode": "off", "status": "ok"}
    timings = ends("over_lora", 1.25, 0.05) | {"over_full": 0.8, "step_seconds": 0.02}
    step = record("05_ilora", "adapter_step", own, timings=timings)
    answer, *details = findings.sentences("05_ilora", [step, *GATES])
    assert answer.startswith(
        "Not shown, next period: against iLoRA LoRA not separated, iLoRA, noise gate worse"
    )
    step_time, claims = details
    assert step_time.startswith("A step of iLoRA in fp32, eager, takes 1.25 times that of LoRA")
    assert "0.80 times that of full fine-tuning" in step_time
    assert "better: full fine-tuning" in claims
    assert "not separated: LoRA" in claims
    for rows, start in (
        (ALIKE, "No, next period: LoRA and 1 control (random fixed gate) are within 0.0010 NDCG@10 of iLoRA"),
        ([gate("lora", -0.02)], "Yes, next period: iLoRA beats LoRA"),
        ([gate("lora", 0.02, seeds=1)], "Not known, next period: too few seeds"),
    ):
        assert findings.sentences("05_ilora", rows)[0].startswith(start)
    assert findings.sentences("05_ilora", []) == []
