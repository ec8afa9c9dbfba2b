"""The replication traps of sequential recommendation, and the test that guards each."""

from __future__ import annotations

import ast

from conftest import ROOT

# What made published figures of one and the same model differ by a factor of three -> its test here.
TRAPS = {
    "undertraining": ("trainer", "test_the_best_weights_on_validation_are_returned_and_early_stop_counts"),
    "sampled metrics": ("protocols", "test_trap_sampled_metrics_inflate_as_the_closed_form_says"),
    "order of tied timestamps": ("data", "test_ties_keep_the_row_order"),
    "another dataset of the same name": ("prepare", "test_counts_are_the_published_ones"),
    "random split of windows": ("splits", "test_random_users_are_disjoint"),
    "PAD and MASK as candidates": (
        "protocols",
        "test_trap_pad_and_mask_are_candidates_in_the_seed_metric_only",
    ),
    "seen items kept or removed": ("protocols", "test_trap_seen_filter_moves_the_rank_and_both_are_reported"),
    "ties in scores": ("protocols", "test_trap_rank_ties_are_pessimistic_under_every_protocol"),
    "the future of other users": ("splits", "test_global_time_trains_only_before_the_point"),
    "data without order": ("statistics", "test_trap_weak_order_shows_in_the_shuffle_control"),
    "one seed": ("statistics", "test_trap_single_seed_carries_no_claim"),
}


def test_every_trap_has_its_test():
    for module, test in TRAPS.values():
        tree = ast.parse((ROOT / "tests" / f"test_{module}.py").read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
