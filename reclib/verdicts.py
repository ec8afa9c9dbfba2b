"""What is left of each published claim once it has been recomputed: claim, verdict, what was found.

A verdict follows from numbers by the rules below and is never typed in. "holds" is said of a number that is
met within 5 %, the tolerance that this project allows its own clocks; "contradicted" of one that the study's
other figures rule out; "not supported" of a difference that chance alone would often give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from reclib import audit
from reclib.audit import Verdict
from reclib.bypass import PLACES
from reclib.claims import ALPHA
from reclib.recreation import LossParts

TOLERANCE = 0.05


class Check(NamedTuple):
    """One claim and what became of it."""

    claim: str
    verdict: Verdict
    found: str  # what was recomputed or measured


def near(found: float, claimed: float) -> bool:
    """Return whether a number is what was claimed, within `TOLERANCE`."""
    return abs(found / claimed - 1) <= TOLERANCE


def of_counts(table: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge parameter counts, rows of `audit.parameter_table`."""
    return [
        Check(
            f"{row['name']}: {row['published']:,} parameters",
            "holds" if row["agrees"] else "contradicted",
            f"{row['counted']:,}; {row['non_embedding_share']:.1%} of them outside item tables and positions",
        )
        for row in table
    ]


def of_rates(rows: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge rates against epoch times, rows of `audit.rates`."""
    return [
        Check(
            f"{row['name']}: {row['claimed_per_second']:,.0f}/s and {row['epoch_seconds'] / 60:.1f} min",
            "holds" if near(row["ratio"], 1) else "contradicted",
            f"together {row['ratio']:.2f} times the sequences that exist; by the clock "
            f"{row['by_clock_per_second']:,.0f}/s",
        )
        for row in rows
    ]


def _met(is_met: bool, row: Mapping[str, Any]) -> Verdict:
    """Judge a ratio; it holds in part where its two figures are not what they are said to be (`but`)."""
    return "contradicted" if not is_met else "holds in part" if row.get("but") else "holds"


def _but(row: Mapping[str, Any]) -> str:
    return f"; read in its files: {row['but']}" if row.get("but") else ""


def of_gains(gains: Iterable[Mapping[str, Any]], cuts: Iterable[Mapping[str, Any]]) -> list[Check]:
    """Judge claimed factors and savings by the published figures that they should follow from."""
    found = [
        Check(
            f"{row['name']}: {row['claim']}",
            _met(near(audit.gain(row), row["claimed"]), row),
            f"{row['before']:g} and {row['after']:g} {row['unit']}: {audit.gain(row):.2f} times{_but(row)}",
        )
        for row in gains
    ]
    return found + [
        Check(
            f"{row['name']}: {row['claim']}",
            _met(abs(audit.cut(row) - row["claimed"]) <= TOLERANCE, row),
            f"{row['before']:g} and {row['after']:g} {row['unit']}: {audit.cut(row):.0%} less{_but(row)}",
        )
        for row in cuts
    ]


def of_difference(name: str, found: audit.Separation, count: int) -> Check:
    """Judge a difference of two published hit rates over `count` predictions."""
    return Check(
        name,
        "holds" if found.p < ALPHA else "not supported",
        f"{found.in_errors:.2f} standard errors over {count:,} predictions, p {found.p:.2f}; "
        f"{found.needed:,} predictions would be needed",
    )


def of_share(name: str, published: float, found: audit.AdapterCount, base: int) -> Check:
    """Judge a published share of trainable parameters; the base has so many of its own."""
    share = (found.total + found.gates) / (base + found.total + found.gates)
    return Check(
        name,
        "holds" if near(share, published) else "contradicted",
        f"{share:.2%}; {found.head_share:.0%} of it for the output table, {found.dead:,} of it dead",
    )


def of_adapters(gradients: Mapping[str, float | None], effects: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Judge that all adapters learn, and that evaluation sees what was learned, from `bypass`."""
    dead = sorted({name.rsplit(".", 1)[-1] for name, norm in gradients.items() if not norm})
    by_mode = {row["mode"]: row for row in effects}
    silent = [place for place in PLACES if by_mode["train"][place] > 0 and by_mode["eval"][place] == 0]
    return [
        Check(
            "adapters in every linear map of a layer",
            "contradicted" if dead == sorted(PLACES) else "holds in part" if dead else "holds",
            f"no gradient for {', '.join(dead)}" if dead else "every adapter gets a gradient",
        ),
        Check(
            "the adapted model is what is evaluated (fp32)",
            "contradicted" if silent else "holds",
            f"eval() drops {', '.join(silent)}: largest change {by_mode['eval']['all']:g}, "
            f"in train mode {by_mode['train']['all']:.2f}",
        ),
    ]


def of_loss(before: LossParts, after: LossParts) -> Check:
    """Judge that the loss asks for hidden items."""
    most = before.visible_loss_share > 0.5
    return Check(
        "the loss is masked-item prediction",
        "contradicted" if most else "holds",
        f"{before.visible_loss_share:.0%} of it is about items that are shown when training begins, "
        f"{after.visible_loss_share:.0%} when it ends; {after.visible_hit:.0%} of those are copied by then",
    )


def of_metric(found: Sequence[Mapping[str, float]]) -> Check:
    """Judge that HR@10 is of the next item, from its metrics by each protocol, the study's first."""
    theirs, kept = found[0], found[2]
    return Check(
        "HR@10 is about the next item",
        "holds" if theirs["per_user"] == 1 else "contradicted",
        f"{theirs['per_user']:.1f} positions a user are ranked: {theirs['hr@10']:.3f}, "
        f"{kept['hr@10']:.3f} for the next item alone, by the same weights",
    )
