"""README and FINDINGS say what the records say, and link to what exists."""

import re

import pandas as pd
from conftest import ROOT

from reclib.experiments import audit


def test_every_number_of_readme_and_findings_is_what_its_record_says(monkeypatch):
    monkeypatch.setenv("RECLIB_ROOT", str(ROOT))
    claims = audit.claims()
    wrong = claims[claims["verdict"].str.startswith("number differs")]
    assert wrong.empty, wrong["verdict"].to_string()
    assert len(claims) > 70
    assert claims.index.is_unique
    assert (claims["record"] != "").all()
    compared = claims[claims["p"] != ""]
    assert (compared[["test", "seeds"]] != "").all(axis=None)
    is_large = pd.to_numeric(compared["p"].replace("below 0.001", "0")) >= 0.05
    assert "holds" not in set(compared["verdict"][is_large])
    assert "not separated" not in set(compared["verdict"][~is_large])
    stated = " ".join(audit.texts().values())
    assert [snippet for snippet in audit.read_claims()[1] if snippet not in stated] == []
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 120
    table = readme[readme.index("## Accuracy") : readme.index("## Speed")]
    assert table.count("\n| ") == 10  # head, rule and at most eight models


def test_links_and_figures_that_the_texts_name_exist():
    for file in [ROOT / "README.md", ROOT / "FINDINGS.md", *(ROOT / "docs").glob("*.md")]:
        text = file.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (file.parent / link).exists(), (file.name, link)
    figures = re.findall(r"`([a-z_]+_(?:[\w-]*\*|[\w-]+_cpu))`", (ROOT / "FINDINGS.md").read_text())
    assert len(figures) > 15
    for name in figures:
        assert list((ROOT / "figures").glob(f"{name}.html")), name


def test_findings_name_records_that_exist():
    text = (ROOT / "FINDINGS.md").read_text()
    for name in set(re.findall(r"executed/[\w/-]+/", text)):
        assert (ROOT / name).is_dir(), name
    for script in set(re.findall(r"benchmarks/\w+\.py", text + (ROOT / "README.md").read_text())):
        assert (ROOT / script).is_file(), script
