from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import dataset_of

from reclib.data.dataset import Dataset
from reclib.experiments import data_prep

# Histories of (item, time); few items and times, so that repeats and ties are frequent.
histories = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=9), min_size=1, max_size=8
)


def by_portions(describe, dataset: Dataset, portion: int):
    """What is described, with the histories cut into portions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "PORTION", portion)
        return describe(dataset)


def per_user(dataset: Dataset) -> list[list[tuple[int, int]]]:
    pairs = list(zip(dataset.items.tolist(), dataset.times.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)]


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 20))
def test_repeats_are_those_of_a_loop(given_histories, portion):
    dataset = dataset_of(given_histories)
    again, exact, in_a_row, targets = 0, 0, 0, []
    for history in per_user(dataset):
        seen: set[int] = set()
        for place, (item, _) in enumerate(history):
            again += item in seen
            in_a_row += place > 0 and history[place - 1][0] == item
            if place == len(history) - 1 and len(history) > 2:
                targets.append(item in seen)
            seen.add(item)
        exact += sum(count - 1 for count in Counter(history).values())
    counts = {"repeat_share": again, "exact_duplicate_share": exact, "in_a_row_share": in_a_row}
    expected = {name: count / dataset.num_interactions for name, count in counts.items()}
    expected |= {"repeat_target_share": np.mean(targets) if targets else 0}
    metrics = by_portions(data_prep.repeats, dataset, portion).metrics
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 20))
def test_candidates_for_the_last_item_are_those_of_a_loop(given_histories, portion):
    dataset = dataset_of(given_histories)
    expected = Counter(
        len({item for item, time in history if time == history[-1][1]})
        for history in per_user(dataset)
        if len(history) > 2
    )
    result = by_portions(data_prep.last_items, dataset, portion)
    assert dict(zip(result.series["candidates"], result.series["users"], strict=True)) == expected
    uncertain = sum(users for candidates, users in expected.items() if candidates > 1)
    share = uncertain / max(sum(expected.values()), 1)
    assert result.metrics["last_item_by_tie_rule_share"] == pytest.approx(share)


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 1000)])
def test_interactions_over_time_are_all_counted_once(unit, per_second):
    start = 1_600_000_000
    times = [[(start + 60 * n * (u + 1)) * per_second for n in range(9)] for u in range(5)]
    dataset = dataset_of([[(1 + n % 4, time) for n, time in enumerate(row)] for row in times], 4, unit)
    made = data_prep.over_time(dataset, data_prep.divisions(dataset, seed=0))
    assert sum(made.series["interactions"]) == dataset.num_interactions
    assert (sum(made.series["new_users"]), sum(made.series["new_items"])) == (5, 4)
    assert made.series["start"][0] == "2020-09-13 12:26"  # of 1.6e9 seconds, in UTC
    assert made.metrics["days"] == pytest.approx(60 * 8 * 5 / 86_400)
    assert start < made.metrics["valid_from"] < made.metrics["test_from"] < start + 60 * 8 * 5
