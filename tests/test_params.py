from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from reclib import parameters
from reclib.config import GPU_LABELS, InputError
from reclib.parameters import Baseline

DEVICES = [label for label in GPU_LABELS if label != "auto" and "-" not in label]
SMOKE = parameters.profile("02_baseline", "smoke")


def build(**changes: object) -> Baseline:
    return parameters.build("02_baseline", SMOKE | changes)


def test_every_profile_on_every_device_is_valid():
    for notebook in parameters.NOTEBOOKS:
        profiles = {name: parameters.profile(notebook, name) for name in parameters.PROFILES}
        work = {
            name: {key: values[key] for key in values if key not in ("tracker", "seeds")}
            for name, values in profiles.items()
        }
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


def test_the_parameter_files_hold_nothing_that_is_not_used():
    for profile in parameters.PROFILES:
        sections = yaml.safe_load((ROOT / f"params/{profile}.yaml").read_text())
        assert set(sections) <= set(parameters.NOTEBOOKS), profile
    assert set(yaml.safe_load((ROOT / "params/smoke.yaml").read_text())) == set(parameters.NOTEBOOKS)
    known = {name for notebook in parameters.NOTEBOOKS for name in parameters.names(notebook)}
    assert parameters.device_names() <= known
    assert {file.stem for file in (ROOT / "params/gpu").glob("*.yaml")} == set(DEVICES)


def test_an_experiment_of_its_own_states_every_parameter():
    file = ROOT / "params/adaptation-beauty.yaml"
    stated = parameters.from_file(file)
    assert list(stated) == parameters.names("05_ilora")
    assert parameters.profile_of("05_ilora", parameters.build("05_ilora", stated)) == "custom"


def test_every_parameter_says_in_its_line_what_it_is():
    source = Path(parameters.__file__).read_text().splitlines()
    for kind in parameters.NOTEBOOKS.values():
        for field in dataclasses.fields(kind):
            lines = [line for line in source if line.startswith(f"    {field.name}: ")]
            assert lines, field.name
            assert all("  # " in line for line in lines), field.name


def test_wrong_values_are_told_in_one_line_that_names_the_parameter():
    for changes, said in [
        ({"batch_szie": 4}, "unknown parameter 'batch_szie' (did you mean 'batch_size'?)"),
        ({"batch_size": -4}, "parameter 'batch_size' is -4"),
        ({"batch_size": 64.0}, "parameter 'batch_size' is 64.0"),
        ({"batch_size": True}, "parameter 'batch_size' is True"),
        ({"batch_size": "1e3"}, "parameter 'batch_size' is '1e3'"),
        ({"gpu": "rtx"}, "'h200' or 'rtx4090'"),
        ({"precision": "fp8"}, "'fp16'"),
        ({"tied": "no"}, "parameter 'tied' is 'no'"),
        ({"tied": 1}, "parameter 'tied' is 1"),
        ({"size": "tinny"}, "did you mean 'tiny'?"),
        ({"seeds": []}, "at least 1"),
        ({"seeds": [3, 3]}, "listed twice"),
        ({"seeds": 0}, "valid list"),
        ({"learning_rate": float("nan")}, "parameter 'learning_rate' is nan"),
        ({"learning_rate": float("inf")}, "parameter 'learning_rate' is inf"),
        ({"mask_prob": 1.0}, "less than 1"),
        ({"micro_batch_size": 5}, "multiple of micro_batch_size=5"),
        ({"tracker": "wandb"}, "'wandb-online'"),
    ]:
        with pytest.raises(InputError) as error:
            build(**changes)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_parameter_is_named():
    values = dict(SMOKE)
    del values["epochs"]
    with pytest.raises(InputError, match="'epochs' is missing"):
        parameters.build("02_baseline", values)


def test_known_misspellings_are_undone_and_told(capsys):
    for name, given, meant in [
        ("tied", "false", False),
        ("tied", "true", True),
        ("precision", "null", None),
        ("micro_batch_size", "none", None),
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "2.5E-4", 0.00025),
        ("seeds", "[0, 1, 2]", [0, 1, 2]),
    ]:
        assert getattr(build(**{name: given}), name) == meant
        assert f"converted: {name}={given!r} -> {meant!r}" in capsys.readouterr().out


def test_a_string_that_is_a_good_value_is_left_alone(capsys):
    assert build(dataset="null").dataset == "null"
    assert capsys.readouterr().out == ""


def test_globals_of_a_script_are_all_checked():
    namespace = {"__name__": "x", "_private": 1, "np": object(), "open": open, **SMOKE}
    assert parameters.read("02_baseline", namespace) == build()
    with pytest.raises(InputError, match="unknown parameter 'epcohs'"):
        parameters.read("02_baseline", namespace | {"epcohs": 2})


def test_a_notebook_may_run_the_cell_again_after_others_left_names():
    # In is IPython's history; `best` is the result of a later cell, `epcohs` a slip in an injected cell
    cells = ["", "epochs: int = 3  # passes", "import os\nfolder = 'x'", "best = max([1, 2])"]
    namespace = {**SMOKE, "In": cells, "Out": {}, "best": 2, "folder": "x"}
    assert parameters.read("02_baseline", namespace) == build()
    slip = namespace | {"In": [*cells, "# Parameters\nepcohs = 5\nepochs = float('nan')"]}
    with pytest.raises(InputError, match=r"'epcohs' \(did you mean 'epochs'\?\)"):
        parameters.read("02_baseline", slip | {"epcohs": 5})


def test_only_cells_of_plain_assignments_name_parameters():
    assert parameters.assigned_names("a = 1\nb: int = -2\nc = [0, 'x']\n# end") == ["a", "b", "c"]
    for source in ("a = f()", "import os\na = 1", "%matplotlib inline", "a.b = 1", "a = b = 1"):
        assert parameters.assigned_names(source) == []


def test_the_device_file_fills_only_what_was_not_given():
    assert parameters.fill(build(), "cpu").precision == "fp32"
    assert parameters.fill(build(precision="bf16"), "cpu").precision == "bf16"
    assert parameters.fill(build(), "t4").compile_mode == "default"
    assert parameters.fill(build(), "cpu").epochs == build().epochs


def test_a_device_without_a_file_is_said(capsys):
    assert parameters.fill(build(), "other") == build()
    assert "'other'" in capsys.readouterr().out


def test_the_name_of_a_profile_is_found_by_comparing():
    name = parameters.profile_of
    assert name("02_baseline", build()) == "smoke"
    assert name("02_baseline", build(gpu="h100", seeds=[4, 5], tracker="tensorboard")) == "smoke"
    assert name("02_baseline", build(precision="bf16", compile_mode="default")) == "smoke"
    for change in ({"epochs": 5}, {"learning_rate": 0.002}, {"dataset": "synthetic"}):
        assert name("02_baseline", build(**change)) == "custom"
    quick = parameters.build("02_baseline", parameters.profile("02_baseline", "quick"))
    assert name("02_baseline", quick) == "quick"


def test_unknown_names_of_notebooks_and_profiles_are_refused():
    with pytest.raises(InputError, match="did you mean '02_baseline'"):
        parameters.build("02_baselin", {})
    with pytest.raises(InputError, match="unknown profile 'fast'; allowed: smoke, quick, lease, full"):
        parameters.profile("02_baseline", "fast")


def test_a_broken_parameter_file_is_named_with_its_line(project: Path):
    (project / "params/quick.yaml").write_text("02_baseline:\n  epochs: [1\n  x: 2\n")
    with pytest.raises(InputError, match=r"quick\.yaml, line 3"):
        parameters.profile("02_baseline", "quick")
    (project / "params/quick.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"quick\.yaml: must be a mapping"):
        parameters.profile("02_baseline", "quick")
