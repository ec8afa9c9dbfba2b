import functools
import typing
from pathlib import Path

import yaml
from conftest import ROOT, refused, smoke

from reclib import parameters
from reclib.config import GPU_LABELS, DataConfig, ModelConfig, TrainConfig, typed, validated
from reclib.parameters import Parameters

DEVICES = [label for label in GPU_LABELS if label != "auto" and "-" not in label]
SMOKE = parameters.profile("02_baseline", "smoke")
build = functools.partial(smoke, "02_baseline")


def test_the_name_of_a_profile_is_found_by_comparing():
    for changes, name in [
        ({"gpu": "h100", "seeds": [4, 5], "tracker": "tensorboard"}, "smoke"),
        ({"precision": "bf16", "compile_mode": "default"}, "smoke"),
        ({"epochs": 5}, "custom"),
        ({"dataset": "synthetic"}, "custom"),
    ]:
        assert parameters.profile_of("02_baseline", build(**changes)) == name


def test_every_profile_on_every_device_is_valid():
    for notebook in parameters.NOTEBOOKS:
        profiles = {name: parameters.profile(notebook, name) for name in parameters.PROFILES}
        work = {name: values | {"tracker": None, "seeds": None} for name, values in profiles.items()}
        for profile, values in profiles.items():
            built = parameters.build(notebook, values)
            assert list(parameters.values(built)) == parameters.names(notebook)
            # A notebook whose profiles ask for the same work has the name of the largest.
            equal = [name for name in profiles if work[name] == work[profile]]
            largest = [name for name in equal if notebook in parameters.stated(name)][-1]
            for label in DEVICES:
                p = parameters.fill(built, label)
                assert parameters.profile_of(notebook, p) == largest, (notebook, profile, label)
                assert parameters.build(notebook, parameters.values(p)) == p


def test_every_parameter_is_used_and_every_device_has_a_file():
    used = {name for notebook in parameters.NOTEBOOKS for name in parameters.names(notebook)}
    assert set(typing.get_type_hints(Parameters)) == used
    assert {file.stem for file in (ROOT / "params/gpu").glob("*.yaml")} == set(DEVICES)
    parameters.build("05_ilora", parameters.from_file(ROOT / "params/adaptation-beauty.yaml"))


def test_wrong_values_are_told_in_one_line_that_names_the_parameter():
    adaptation = parameters.profile("05_ilora", "smoke")
    data = parameters.profile("01_data_prep", "smoke")
    for notebook, values, part in [
        ("02_baseline", SMOKE | {"epcohs": 4}, "unknown parameter 'epcohs' (did you mean 'epochs'?)"),
        ("02_baseline", SMOKE | {"batch_size": -4}, "parameter 'batch_size' is -4"),
        ("02_baseline", SMOKE | {"batch_size": True}, "parameter 'batch_size' is True"),
        ("02_baseline", SMOKE | {"gpu": "rtx"}, "'h200' or 'rtx4090'"),
        ("02_baseline", SMOKE | {"tied": "no"}, "parameter 'tied' is 'no'"),
        ("02_baseline", SMOKE | {"size": "tinny"}, "did you mean 'tiny'?"),
        ("02_baseline", SMOKE | {"seeds": [3, 3]}, "listed twice"),
        ("02_baseline", {k: v for k, v in SMOKE.items() if k != "epochs"}, "'epochs' is missing"),
        ("01_data_prep", data | {"columns": "user"}, "expected pairs"),
        ("05_ilora", adaptation | {"num_experts": 3}, "divisible by num_experts=3"),
        ("05_ilora", adaptation | {"arms": ["none", "lora"]}, "arms lacks ilora"),
        ("05_ilora", adaptation | {"past_share": 0.8}, "nothing for the test"),
        ("02_baselin", {}, "did you mean '02_baseline'"),
    ]:
        assert part in refused(None, parameters.build, notebook, values)
    unknown = "unknown profile 'fast'; allowed: smoke, quick, lease, full"
    assert unknown in refused(None, parameters.profile, "02_baseline", "fast")


def test_impossible_values_are_told_in_one_line():
    odd = {"positions": "sinusoidal", "hidden_dim": 3, "num_heads": 1}
    focal = {"objective": "seed_focal", "layout": "padded", "loss": "sampled_softmax"}
    few_logits = ({"loss": "gbce"}, {"compile_mode": "graph"}, {"head_rows": "all"}, {"loss": "fused"})
    for kind, values, part in [
        (ModelConfig, {"num_items": 0}, "'num_items' is 0"),
        (ModelConfig, {"num_items": 5, "hidden_dim": 10, "num_heads": 3}, "divisible by num_heads=3"),
        (ModelConfig, {"num_items": 5, "hiden_dim": 3}, "did you mean 'hidden_dim'?"),
        (ModelConfig, {}, "'num_items' is missing"),
        (ModelConfig, {"num_items": 5} | odd, "even hidden_dim"),
        (DataConfig, {"min_user": "5"}, "'min_user' is '5'"),
        (TrainConfig, {"batch_size": 10, "micro_batch_size": 3}, "multiple of micro_batch_size=3"),
        (TrainConfig, {"learning_rate": float("nan")}, "'learning_rate' is nan"),
        (TrainConfig, {"seed": 2**64}, "'seed' is 18446744073709551616"),
        (TrainConfig, {"loss": "gbce", "head_rows": "all"}, "needs loss='plain', not 'gbce'"),
        (TrainConfig, focal, "knows no loss='sampled_softmax'"),
        (TrainConfig, {"objective": "next_item", "visible_targets": True}, "objective is 'next_item'"),
        *((TrainConfig, {"prior": "counts"} | f, "prior='counts' needs the logits") for f in few_logits),
    ]:
        assert part in refused(None, validated, kind, values)


def test_known_misspellings_are_undone_and_told(capsys):
    for name, text, value in [
        ("tied", "false", False),
        ("tied", "true", True),
        ("precision", "null", None),
        ("micro_batch_size", "none", None),
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "2.5E-4", 0.00025),
        ("seeds", "[0, 1, 2]", [0, 1, 2]),
    ]:
        assert getattr(build(**{name: text}), name) == value
        assert f"converted: {name}={text!r} -> {value!r}" in capsys.readouterr().out
    assert build(dataset="null").dataset == "null"  # a good value as it is
    assert capsys.readouterr().out == ""


def test_a_name_that_is_no_parameter_is_told_from_what_later_cells_left():
    # In is IPython's history; `best` is the result of a later cell, `epcohs` a slip in an injected cell
    cells = ["", "epochs: int = 3  # passes", "import os\nfolder = 'x'", "best = max([1, 2])"]
    namespace = {**SMOKE, "In": cells, "Out": {}, "best": 2, "folder": "x", "_private": 1, "open": open}
    assert parameters.read("02_baseline", namespace) == build()
    slip = namespace | {"In": [*cells, "# Parameters\nepcohs = 5\nepochs = float('nan')"]}
    message = "unknown parameter 'epcohs' (did you mean 'epochs'?)"
    for names in (slip | {"epcohs": 5}, SMOKE | {"epcohs": 2}):  # the second without a history
        assert message in refused(None, parameters.read, "02_baseline", names)
    assert parameters.assigned_names("a = 1\nb: int = -2\nc = [0, 'x']\n# end") == ["a", "b", "c"]
    for source in ("a = f()", "import os\na = 1", "%matplotlib inline", "a.b = 1", "a = b = 1"):
        assert parameters.assigned_names(source) == []


def test_the_device_file_fills_only_what_was_not_given(capsys):
    assert parameters.fill(build(), "cpu").precision == "fp32"
    assert parameters.fill(build(precision="bf16"), "cpu").precision == "bf16"
    assert parameters.fill(build(), "t4").compile_mode == "default"
    assert parameters.fill(build(), "other") == build()
    assert "'other'" in capsys.readouterr().out


def test_a_broken_parameter_file_is_named_with_its_line(project: Path):
    file = project / "params/quick.yaml"
    for text, part in [
        ("02_baseline:\n  epochs: [1\n  x: 2\n", "quick.yaml, line 3: not valid YAML"),
        ("- 1\n", "quick.yaml: must be a mapping"),
        ("02_baseline: 3\n", "section '02_baseline' must be a mapping"),
        ("02_baseline:\n  epochs: 1\n  epochs: 2\n", "line 3: 'epochs' stands twice"),
        ("02_baseline:\n  off: 1\n", "line 2: False as a key is no text"),
        ("a: 2026-13-45\n", "quick.yaml: "),
    ]:
        file.write_text(text)
        assert part in refused(None, parameters.profile, "02_baseline", "quick")
    file.write_text(yaml.safe_dump({"02_baseline": {"epochs": 7}}))
    assert parameters.profile("02_baseline", "quick")["epochs"] == 7


def test_values_of_the_command_line_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type

    for text in ("5", "-4", "1e-3", "0.5", "True", "False", "None", "true", "tiny", "[1, 2]", "a=b", "1_000"):
        assert typed(text) == _resolve_type(text), text
        assert type(typed(text)) is type(_resolve_type(text)), text
