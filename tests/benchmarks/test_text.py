"""README and FINDINGS say what the records say, and link to what exists."""

import re

from conftest import ROOT

from reclib.experiments.grids import read_rows

GRIDS = {"MovieLens 100K": "ml-100k", "MovieLens 1M": "ml-1m", "Amazon Beauty": "beauty"}
MODELS = {
    "BERT4Rec": "bert4rec",
    "its causal twin": "causal",
    "pairwise counts": "pairwise_counts",
    "Markov chain": "markov",
    "EASE": "ease",
    "popularity": "popularity",
}


def test_every_cell_of_the_table_of_accuracy_is_the_newest_record():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    lines = text[text.index("## Accuracy") : text.index("## Speed")].splitlines()
    head, _, *rows = [[cell.strip() for cell in one.split("|")[1:-1]] for one in lines if one.startswith("|")]
    assert len(rows) <= 8
    compared = 0
    for dataset, *cells in zip(*([head, *rows]), strict=True):
        if dataset not in GRIDS:
            continue
        records = read_rows(ROOT / "executed" / "cpu" / "grids" / f"{GRIDS[dataset]}.jsonl")
        newest = {
            one["own_params"]["model"]: one["metrics"]
            for one in records
            if one["name"] == "test_metrics" and one["seed"] is None
        }
        for (model, *_), cell in zip(rows, cells, strict=True):
            if not cell:
                continue
            name = MODELS.get(model.partition(",")[0])
            (found,) = [v for key, v in newest.items() if key == name or (not name and key.startswith(model))]
            said = [float(number) for number in re.findall(r"0\.\d{4}", cell)]
            recorded = [round(found[f"ndcg@10{end}"], 4) for end in ("", "_low", "_high")]
            assert said == recorded, (model, dataset)
            compared += 1
    assert compared == 20


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
