"""The index page of the figures: each notebook's question, its answer from the records, its figures.

Plain HTML and CSS in one file, readable without network, light or dark as the reader's system is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import get_args

from reclib import claims
from reclib.tables import ARM_NAMES, TASK_NAMES, Record, best_work, model_name, profile

GENERATOR = '<meta name="generator" content="reclib.figures">'


@dataclass(frozen=True)
class Card:
    """One figure on the page."""

    notebook: str
    name: str  # of its file, without .html
    title: str
    height: int  # pixels
    records: Sequence[Record]


@dataclass(frozen=True)
class Chapter:
    """What a notebook asks, and how its records answer."""

    title: str
    question: str
    answer: Callable[[dict[str, list[Record]]], str]  # from records by name; "" where they say nothing


def _data_answer(found: dict[str, list[Record]]) -> str:
    lines = []
    for record in found.get("preparation", []):
        m = record["metrics"]
        lines.append(
            f"{_dataset(record)}: {m['users']:,} users, {m['items']:,} items and "
            f"{m['interactions']:,} interactions are left of {m['source_interactions']:,}"
        )
    for record in found.get("last_items", []):
        share = record["metrics"]["last_item_by_tie_rule_share"]
        lines.append(f"for {share:.0%} of the users only the order of rows decides the test target")
    return "; ".join(lines)


def _baseline_answer(found: dict[str, list[Record]]) -> str:
    """Return a sentence for each dataset: HR@10 of the models with intervals, best first."""
    scored: dict[str, dict[str, Record]] = {}
    for record in found.get("test_metrics", []):
        model = (record.get("own_params") or {}).get("model")
        if model is None or "hr@10" not in record["metrics"]:
            continue
        models = scored.setdefault(f"{_dataset(record)} ({record['label']})", {})
        if model not in models or record.get("seed") is None:
            models[model] = record
    sentences = []
    for place, models in scored.items():
        best_first = sorted(models.items(), key=lambda item: -item[1]["metrics"]["hr@10"])
        said = ", ".join(_with_interval(model, record["metrics"]) for model, record in best_first)
        sentences.append(f"HR@10 on {place}: {said}")
    return ". ".join(sentences)


def _with_interval(model: str, metrics: Mapping[str, float]) -> str:
    said = f"{model_name(model)} {metrics['hr@10']:.3f}"
    if metrics.get("hr@10_low") is None:
        return said
    return f"{said} [{metrics['hr@10_low']:.3f}, {metrics['hr@10_high']:.3f}]"


def _speed_answer(found: dict[str, list[Record]]) -> str:
    rungs = [r for r in found.get("ladder", []) if r["timings"].get("step_seconds")]
    lines = []
    if len(rungs) > 1:
        first = max(rungs, key=lambda r: -r["own_params"]["rung"])
        best = min(rungs, key=lambda r: r["timings"]["step_seconds"])
        factor = first["timings"]["step_seconds"] / best["timings"]["step_seconds"]
        name = best["own_params"]["name"]
        lines.append(f"from the {first['own_params']['name']} to {name} a step is {factor:.1f} times faster")
    for record in found.get("step", []):
        asked, took = record["own_params"], record["timings"]
        eager = asked["compile_mode"] == "off" and record["kind"] == "measured"
        if took.get("sequences_per_second") and eager:
            rate = took["sequences_per_second"]
            lines.append(f"{asked['precision']} at batch {asked['batch_size']}: {rate:,.0f} sequences/s")
    return "; ".join(lines)


def _adapter_answer(found: dict[str, list[Record]]) -> str:
    """Return what iLoRA's step costs, and for each task the arms that differ from iLoRA."""
    lines = []
    for record in found.get("adapter_step", []):
        asked, took = record["own_params"], record["timings"]
        if asked["model"] == "ilora" and asked["compile_mode"] == "off" and took.get("over_full"):
            said = (
                f"{took['over_lora']:.2f} times LoRA's and {took['over_full']:.2f} times full fine-tuning's"
            )
            lines.append(f"a step of iLoRA in {asked['precision']} takes {said}")
    for task, name in TASK_NAMES.items():
        rows = [r for r in found.get("gate_comparison", []) if r["own_params"]["task"] == task]
        rows = [r for r in rows if r["own_params"]["metric"] == "ndcg@10"]
        by_claim: dict[str, list[str]] = {word: [] for word in get_args(claims.Claim)}
        for record in rows:
            m = record["metrics"]
            word = claims.claim(m["difference"], m["adjusted_p"], (m["seeds"], m["reference_seeds"]))
            by_claim[word].append(ARM_NAMES[record["own_params"]["model"]])
        parts = [f"{word}: {', '.join(arms)}" for word, arms in by_claim.items() if arms]
        lines += [f"{name}, NDCG@10 against iLoRA: {'; '.join(parts)}"] if parts else []
    return ". ".join(lines)


def _device_answer(found: dict[str, list[Record]]) -> str:
    steps = found.get("hardware_step", [])
    planned = {r["own_params"]["device"] for r in steps if r["own_params"].get("basis") == "unvalidated"}
    timed = {r["own_params"]["device"] for r in steps if r["kind"] == "measured"}
    if not steps:
        return ""
    return (
        f"Measured on {', '.join(sorted(timed)) or 'no device'}; predicted, and unvalidated, for "
        f"{len(planned)} GPUs from their data sheets."
    )


CHAPTERS: dict[str, Chapter] = {
    "01_data_prep": Chapter("The data", "What exactly is being predicted?", _data_answer),
    "02_baseline": Chapter("The baseline", "Is BERT4Rec any good, and against what?", _baseline_answer),
    "04_amp_compile": Chapter("Speed", "What do AMP and torch.compile give, and to whom?", _speed_answer),
    "05_ilora": Chapter("Adapters", "Does a gate on the user's history earn its place?", _adapter_answer),
    "06_hardware": Chapter("Devices", "Which device for which size, and what would it cost?", _device_answer),
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --paper: #fbfbfa;
  --card: #fff; --edge: #d9dde2; --accent: #0072B2; --warn: #fff3d6; --warn-ink: #6b4700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #a2a9b1; --paper: #16181c;
  --card: #1f2227; --edge: #363b42; --accent: #6cb6ff; --warn: #4a3a12; --warn-ink: #ffe2a3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 3rem 1.5rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .2rem; }
a { color: var(--accent); }
.question { font-size: 1.1rem; color: var(--muted); margin: 0 0 .6rem; }
.answer { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem; margin: 0 0 1.4rem; }
nav a { margin-right: 1.2rem; }
figure { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  margin: 0 0 1.6rem; overflow: hidden; }
iframe { display: block; width: 100%; border: 0; background: #fff; }
figcaption { padding: .7rem 1.1rem .8rem; color: var(--muted); font-size: .88rem;
  border-top: 1px solid var(--edge); }
.smoke { background: var(--warn); color: var(--warn-ink); padding: .05rem .45rem;
  border-radius: 4px; font-weight: 600; }
figcaption a { white-space: nowrap; }
.muted { color: var(--muted); }
"""


def index(cards: Sequence[Card], records: Sequence[Record]) -> str:
    """Return the page as HTML: a section per notebook that has a figure, in reading order."""
    names = sorted({card.notebook for card in cards})
    links = " ".join(f'<a href="#{name}">{name[:2]} {_chapter(name).title}</a>' for name in names)
    body = "".join(_section(name, cards, records) for name in names)
    if not names:
        body = '<p class="muted">There are no records yet: run <code>make study</code>.</p>\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>How far and how cheaply can BERT4Rec be scaled?</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n<h1>How far and how cheaply can BERT4Rec be scaled?</h1>\n"
        '<p class="muted">Every figure is built from recorded runs alone. Filled marks and solid '
        "lines are measured; hollow, hatched and dashed ones are predicted, unless a figure says otherwise."
        "</p>\n"
        f"<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )


def _section(name: str, cards: Sequence[Card], records: Sequence[Record]) -> str:
    chapter = _chapter(name)
    found: dict[str, list[Record]] = {}
    for record in best_work(r for r in records if r["notebook"] == name):
        found.setdefault(record["name"], []).append(record)
    answer = chapter.answer(found)
    figures = "".join(_figure(card) for card in cards if card.notebook == name)
    said = f'<p class="answer">{escape(answer)}.</p>\n' if answer else ""
    return (
        f'<section id="{name}">\n<h2>{name[:2]} {escape(chapter.title)}</h2>\n'
        f'<p class="question">{escape(chapter.question)}</p>\n{said}{figures}</section>\n'
    )


def _figure(card: Card) -> str:
    address = f"{card.name}.html"
    return (
        f'<figure>\n<iframe src="{address}" title="{escape(card.title)}" height="{card.height}" '
        f'loading="lazy"></iframe>\n<figcaption>{_origin(card.records)} '
        f'<a href="{address}">Open alone</a></figcaption>\n</figure>\n'
    )


def _origin(records: Sequence[Record]) -> str:
    """Say on what the numbers were made: device, profile, data, day; a smoke run stands out."""
    kinds = " and ".join(sorted({record["kind"] for record in records})).capitalize()
    devices = ", ".join(sorted({record["device"]["name"] for record in records}))
    prints = sorted({str((record.get("data") or {}).get("fingerprint")) for record in records})
    names = {record["profile"] for record in records}
    profiles = sorted(profile(name) for name in names)
    smoke = '<span class="smoke">smoke run, not a result</span> ' if "smoke" in names else ""
    return (
        f"{smoke}{kinds} on {escape(devices)} ({escape(records[0]['label'])}), "
        f"{' and '.join(profiles)}, data {escape(_dataset(records[0]))} {', '.join(prints)}, "
        f"{max(record['time'] for record in records)[:10]}."
    )


def _chapter(name: str) -> Chapter:
    return CHAPTERS.get(name) or Chapter(name[3:].replace("_", " ").capitalize(), "", lambda _: "")


def _dataset(record: Record) -> str:
    return str((record.get("data") or {}).get("name"))
