"""Figures, tables and findings of accuracy: what is drawn and said is what the records say."""

import copy
from collections import defaultdict

import plotly.graph_objects as go
from figure_records import (
    ARMS,
    EVERY,
    MODELS,
    arms,
    comparisons,
    curves,
    ends,
    of_grid,
    protocols,
    races,
    scores,
    shuffle_controls,
)

from reclib.evaluate import statistics
from reclib.report import figures, findings, style, tables

GREY = style.MUTED


def shown(name: str, records: list[dict]) -> go.Figure:
    return figures.show(name, *records)


def title(name: str, records: list[dict]) -> str:
    return shown(name, records).layout.title.text


def colors(figure: go.Figure) -> dict[str, set[str]]:
    """Return the colours of the marks of each named row."""
    found = defaultdict(set)
    for trace in figure.data:
        if trace.type == "scatter" and "lines" not in (trace.mode or "") and trace.marker.symbol != "line-ns":
            for name in trace.y:
                found[name].add(trace.marker.color)
    return found


def test_a_figure_does_not_change_its_records_and_does_not_depend_on_their_order():
    for name in EVERY:
        records = EVERY[name]()
        before = copy.deepcopy(records)
        ordered = next(iter(tables.groups(records).values()))
        other = next(iter(tables.groups(reversed(records)).values()))
        drawn = shown(name, ordered)
        assert drawn.to_json() == shown(name, other).to_json()
        assert records == before
        assert drawn.layout.title.subtitle.text.startswith(records[0]["data"]["name"])
        assert "long runs, committed" in drawn.layout.title.subtitle.text
        assert drawn.layout.title.text[0] == drawn.layout.title.text[0].upper()
        model = records[0]["own_params"]["model"]
        alone = [record for record in records if record["own_params"]["model"] == model]
        assert shown(name, alone).layout.title.text  # one model alone can be drawn


def test_learning_curves_name_the_best_model_by_its_mean_over_seeds():
    assert title("learning_curves", curves()) == (
        "Causal twin is best on validation: NDCG@10 0.151, mean of 3 seeds"
    )
    lucky = curves()
    lucky[0]["series"]["valid_ndcg@10"][-1] = 0.17  # one seed of the other model above all others,
    lucky[1]["series"]["valid_ndcg@10"] = [0.1] * 12  # and one far below
    assert title("learning_curves", lucky).startswith("Causal twin")


def test_every_comparison_says_what_may_be_claimed():
    figure = shown("comparison", comparisons())
    said = {a.y: a.text for a in figure.layout.annotations if a.xref == "x"}
    expected = {tables.model_name(name): "worse" for name in MODELS if name != "bert4rec"}
    assert said == expected | {"causal twin": "not separated"}
    assert figure.layout.title.text == "Against BERT4Rec, HR@10 of 6 models: 5 worse, 1 not separated"
    few = comparisons(reference_seeds=1)
    assert title("comparison", few) == (
        "Against BERT4Rec, HR@10 of 6 models: no claim, with fewer than 3 seeds"
    )
    better = comparisons(difference=0.05, difference_low=0.04, difference_high=0.06, adjusted_p=0.001)
    assert title("comparison", better).endswith("6 better")


def test_open_marks_are_those_that_cannot_be_compared():
    figure = shown("protocols", protocols())
    drawn = [trace for trace in figure.data if trace.customdata is not None and trace.y[0] < 7]
    names = figure.layout.yaxis.ticktext
    for trace in drawn:
        for y in trace.y:
            sampled = any(word in names[round(y)] for word in ("100", "seed study's"))
            assert (trace.marker.symbol == "diamond-open") == sampled
    assert "bar: 95 % interval" in figure.layout.title.subtitle.text


def test_order_matters_only_where_the_interval_says_so():
    assert title("shuffle_control", shuffle_controls()) == (
        "Order matters for 3 of 7 models, most for Markov chain: shuffled it loses 70%"
    )
    unsure = shuffle_controls()
    for one in unsure:
        one["metrics"]["shuffled_change_high"] = 0.001
    assert title("shuffle_control", unsure).startswith("Order matters for none")


def test_arms_are_sorted_and_coloured_by_their_interval():
    figure = shown("ablation", arms())
    order = [name.replace("<br>", " ") for name in figure.layout.yaxis.categoryarray]
    assert order == sorted(ARMS, key=ARMS.get, reverse=True)
    by_name = {name.replace("<br>", " "): drawn for name, drawn in colors(figure).items()}
    assert by_name["twice the width"] == {style.GREEN}
    assert by_name["untied tables"] == {style.ORANGE}
    assert by_name["last window only"] == {GREY}  # its interval holds zero
    assert figure.layout.title.text == "Of 6 changes to “base”, 2 raise NDCG@10, 3 lower it"
    assert "0: base, NDCG@10 0.1000" in figure.layout.title.subtitle.text


def test_arms_with_too_few_seeds_carry_no_claim():
    figure = shown("ablation", arms(seeds=statistics.MIN_SEEDS - 1))
    assert set.union(*colors(figure).values()) == {GREY}
    assert figure.layout.title.text == "6 changes to “base”, of fewer seeds than a claim needs"


def test_the_fastest_learner_is_said_to_lead_only_where_it_does():
    assert (
        title("equal_time", races()) == "BERT4Rec (ours) leads at every time: in the end 0.160 against 0.130"
    )
    late = races()
    late[0]["series"]["ndcg@10"][0] = 0.0
    assert title("equal_time", late).startswith("BERT4Rec (ours) leads after 20 minutes:")


def test_the_table_shows_the_newest_scoring_with_its_seeds():
    ended = {"mrr": 0.5, "hr@10": 0.5, "hr@10_low": 0.4, "hr@10_high": 0.6}
    with_more_seeds = [one | {"seed": 3} for one in scores() if one["seed"] == 0]
    again = [one | {"time": "2026-02-01", "metrics": one["metrics"] | ended} for one in scores()]
    table = tables.accuracy([*scores(), *again, *with_more_seeds])
    assert len(table) == len(MODELS)
    assert set(table["HR@10"]) == {"0.5000 (0.4000 to 0.6000)"}
    assert table.loc[("made-up", "BERT4Rec"), "seeds"] == "4"
    assert table.loc[("made-up", "EASE"), "seeds"] == ""


def test_differences_are_tabled_with_their_corrections():
    table = tables.differences([*comparisons(), *scores()], "comparison")
    assert len(table) == 2 * (len(MODELS) - 1)
    row = table.loc[("made-up", "EASE")].iloc[0]
    assert list(row) == ["BERT4Rec", "HR@10", "-0.0700 (-0.0850 to -0.0550)", "no and 3", 0.001, 0.022]
    assert tables.differences(scores(), "peer_comparison").empty


def test_the_answer_of_a_comparison_says_no_more_than_its_claims():
    def compared(model, difference, adjusted_p, seeds):
        metrics = ends("difference", difference, 0.01) | {"adjusted_p": adjusted_p, "seeds": seeds}
        own = {"model": model, "against": "bert4rec", "metric": "ndcg@10"}
        return of_grid("comparison", own, metrics | {"reference_seeds": 3})

    scored = {"bert4rec": 0.2, "ease": 0.15, "markov": 0.25, "causal": 0.21}
    rows = [
        of_grid("test_metrics", {"model": name}, ends("ndcg@10", value, 0.01) | {"hr@10": value})
        for name, value in scored.items()
    ]
    twin = compared("causal", 0.01, 0.3, 3)
    ease, markov = compared("ease", -0.05, 0.01, 0), compared("markov", 0.05, 0.01, 0)

    def answer(*comparisons):
        return findings.sentences("02_baseline", [*rows, *comparisons, twin])[0]

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
