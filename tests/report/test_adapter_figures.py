"""Figures of adapters: what is drawn is what the records say."""

from __future__ import annotations

import pytest
from figure_records import adapted, adapter_steps, gate_comparisons

from reclib.config import CONTROLS
from reclib.report import figures, findings, style, tables
from reclib.report.tables import ARM_NAMES

ARMS = list(ARM_NAMES)


def test_every_arm_but_the_controls_has_its_mark_and_the_base_is_a_line():
    figure = figures.show("accuracy_by_share", *adapted())
    drawn = [trace.name for trace in figure.data if trace.showlegend]
    others = {*CONTROLS, "none", "pairwise_counts"}  # no arms, and lines
    assert drawn == [ARM_NAMES[arm] for arm in ARMS if arm not in others]
    bias = next(trace for trace in figure.data if trace.name == ARM_NAMES["bias"])
    assert bias.x[0] == pytest.approx(100 * 0.01 * ARMS.index("bias"))
    assert bias.y[0] == pytest.approx(0.05 + 0.001 * ARMS.index("bias"))
    lines = sorted(shape.y0 for shape in figure.layout.shapes)
    assert lines == pytest.approx([0.05, 0.05, 0.061, 0.061])  # base and counts, one of each in each panel
    assert ARM_NAMES["pairwise_counts"] in figure.layout.title.text  # highest of these made-up records


def test_claims_are_coloured_and_counted_and_too_few_seeds_claim_nothing():
    figure = figures.show("gate_comparison", *gate_comparisons("gate_comparison", "ilora"))
    title = figure.layout.title.text
    assert title == "Against iLoRA, next period: of 11 arms 4 worse, 4 better, 3 not separated"
    color = {name: t.marker.color for t in figure.data if t.type == "scatter" for name in t.y}
    assert len(color) == 11
    worse, better, unsaid = (color[ARM_NAMES[arm]] for arm in ("none", "full", "lora"))
    assert (worse, better, unsaid) == (style.ORANGE, style.GREEN, style.MUTED)
    figure = figures.show("adaptation_gain", *gate_comparisons("adaptation_gain", "none", seeds=1))
    assert figure.layout.title.text.endswith("of 11 arms no claim, with fewer than 3 seeds")
    assert {t.marker.color for t in figure.data if t.type == "scatter"} == {style.MUTED}


def test_the_findings_say_whether_the_gate_helps_and_what_it_costs():
    records = [*adapter_steps(), *gate_comparisons("gate_comparison", "ilora")]
    answer, *details = findings.sentences("05_ilora", records)
    assert answer.startswith("Not shown, next period: against iLoRA LoRA not separated")
    alike = [r for r in records if r["own_params"]["model"] in ("lora", "fixed_gate")]
    no = findings.sentences("05_ilora", alike)[0]
    assert no.startswith("No, next period: LoRA and 1 control (random fixed gate) are within ")
    assert "of iLoRA, where a difference of " in no
    said = "\n".join(details)
    assert "A step of iLoRA in fp32, eager, takes 1.25 times that of LoRA" in said
    assert "0.80 times that of full fine-tuning" in said
    assert "better: full fine-tuning" in said
    assert "not separated: LoRA" in said
    few, *_ = findings.sentences("05_ilora", gate_comparisons("gate_comparison", "ilora", seeds=1))
    assert few.startswith("Not known, next period: too few seeds")
    assert findings.sentences("05_ilora", []) == []


def test_every_arm_has_a_name():
    from typing import get_args

    from reclib.parameters import Arms, Tasks

    arms = ARM_NAMES.keys() - {"pairwise_counts"}  # a count, which is no choice
    for kind, names in ((Arms, arms), (Tasks, tables.TASK_NAMES)):
        (choice,) = get_args(get_args(kind)[0])
        assert set(get_args(choice)) == set(names)
