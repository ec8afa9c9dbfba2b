"""What an arm of a scaling grid varies, told from its name as the files of `params/grids` give it."""

from __future__ import annotations

import re

RATES = {"half": " half rate", "rule": "", "twice": " twice rate"}  # how the arms that check the rule end


def sweep_of(arm: str) -> str:
    """Return the sweep of an arm: width at two layers, depth, untied tables, other rates or tuned settings.

    A size outside of the family `w<width>d<depth>` counts as one of the widths.
    """
    if arm.endswith(" untied"):
        return "untied tables"
    if any(end and arm.endswith(end) for end in RATES.values()):
        return "other learning rate"
    if arm.endswith("(tuned)"):
        return "tuned settings"
    in_depth = re.fullmatch(r"w\d+d\d+", arm) and not arm.endswith("d2")
    return "depth" if in_depth else "width"
