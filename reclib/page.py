"""The index page of the figures: each notebook's question, its answer from the records, its figures.

Plain HTML and CSS in one file, readable without network, light or dark as the reader's system is. A section
stands for every notebook that is there, with its question in the notebook's own words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from reclib.answers import CHAPTERS, Chapter
from reclib.config import InputError
from reclib.notebook_params import NOTEBOOKS
from reclib.tables import Record, best_work, profile

FEW = 4  # devices, or versions of the data, that a caption names
GENERATOR = '<meta name="generator" content="reclib.figures">'


@dataclass(frozen=True)
class Card:
    """One figure on the page."""

    notebook: str
    name: str  # of its file, without .html
    title: str
    height: int  # pixels
    records: Sequence[Record]
    figure: str = ""  # its function's name, without dataset and device


@dataclass(frozen=True)
class Question:
    """What a notebook asks: its first heading, without the number, and its first paragraph."""

    heading: str
    paragraph: str  # Markdown


def questions(notebooks: Path) -> dict[str, Question]:
    """Return what each notebook in a folder asks, by name, in reading order."""
    return {file.stem: _question(file) for file in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))}


def _question(file: Path) -> Question:
    """Read the first heading and paragraph of a notebook; an empty one where it has none."""
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file.name}: not a notebook (broken JSON, or no cells)") from None
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    heading, _, rest = (texts[0] if texts else "").strip().partition("\n")
    asked = re.sub(r"^#+\s*(\d\d\s+)?", "", heading)
    paragraph = rest.strip().split("\n\n")[0]
    return Question(asked, "" if paragraph.startswith(("|", "#", "-")) else " ".join(paragraph.split()))


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --paper: #fbfbfa;
  --card: #fff; --edge: #d9dde2; --accent: #0072B2; --warn: #fff3d6; --warn-ink: #6b4700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #a2a9b1; --paper: #16181c;
  --card: #191919; --edge: #363b42; --accent: #6cb6ff; --warn: #4a3a12; --warn-ink: #ffe2a3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 3rem 1.5rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 3.2rem 0 .4rem; scroll-margin-top: 1rem; }
h2 .number { color: var(--muted); font-weight: 400; margin-right: .35rem; }
a { color: var(--accent); }
p { max-width: 46rem; }
nav ol { list-style: none; margin: 1.4rem 0 0; padding: 0; }
nav li { padding: .3rem 0; }
nav .number { color: var(--muted); margin-right: .5rem; }
.answer { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem; margin: 1rem 0 .3rem;
  font-size: 1.06rem; max-width: 52rem; }
.muted, .origin { color: var(--muted); }
.origin { font-size: .88rem; margin: 0 0 1.4rem; padding-left: calc(.9rem + 4px); }
code { background: var(--card); border: 1px solid var(--edge); border-radius: 4px; padding: .05rem .3rem;
  font-size: .9em; }
figure { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  margin: 0 0 1.6rem; overflow: hidden; }
iframe { display: block; width: 100%; border: 0; background: var(--card); }
figcaption { padding: .7rem 1.1rem .8rem; color: var(--muted); font-size: .88rem;
  border-top: 1px solid var(--edge); }
figcaption a, time { white-space: nowrap; }
summary { cursor: pointer; color: var(--accent); padding: .4rem 0; margin-bottom: .8rem; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.smoke { background: var(--warn); color: var(--warn-ink); padding: .05rem .45rem;
  border-radius: 4px; font-weight: 600; }
@media (max-width: 640px) { body { padding: 1.6rem .9rem 3rem; } h1 { font-size: 1.6rem; }
  h2 { font-size: 1.25rem; margin-top: 2.6rem; } figure { margin: 0 -.5rem 1.2rem; } }
"""

# A folded frame has no size, and browsers load it all the same: its figure would be drawn into nothing.
_UNFOLD = """
for (const part of document.querySelectorAll("details"))
  part.addEventListener("toggle", () => {
    for (const frame of part.querySelectorAll("iframe[data-src]")) {
      frame.src = frame.dataset.src;
      frame.removeAttribute("data-src");
    }
  });
"""


def index(cards: Sequence[Card], records: Sequence[Record], asked: Mapping[str, Question]) -> str:
    """Return the page as HTML: a section per notebook, in reading order.

    `asked` is what `questions` returns; a notebook that is only in the records has its section too.
    """
    names = sorted({*asked, *(card.notebook for card in cards)})
    links = "".join(
        f'<li><span class="number">{name[:2]}</span>'
        f'<a href="#{name}">{escape(_heading(name, asked))}</a></li>\n'
        for name in names
    )
    body = "".join(_section(name, cards, records, asked) for name in names)
    if not cards:
        body = '<p class="muted">There are no records yet: run <code>make study</code>.</p>\n' + body
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>How far and how cheaply can BERT4Rec be scaled?</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n<h1>How far and how cheaply can BERT4Rec be scaled?</h1>\n"
        '<p class="muted">Every number and every figure is built from recorded runs alone. Filled marks and '
        "solid lines are measured; hollow, hatched and dashed ones are predicted, unless a figure says "
        f'otherwise.</p>\n<nav aria-label="Questions">\n<ol>\n{links}</ol>\n</nav>\n'
        f"<main>\n{body}</main>\n<script>{_UNFOLD}</script>\n</body>\n</html>\n"
    )


def _section(
    name: str, cards: Sequence[Card], records: Sequence[Record], asked: Mapping[str, Question]
) -> str:
    mine = [card for card in cards if card.notebook == name]
    work = best_work(r for r in records if r["notebook"] == name)
    found: dict[str, list[Record]] = {}
    for record in work:
        found.setdefault(record["name"], []).append(record)
    parts = [f'<h2><span class="number">{name[:2]}</span>{escape(_heading(name, asked))}</h2>\n']
    if name in asked and asked[name].paragraph:
        parts.append(f'<p class="muted">{_inline(asked[name].paragraph)}</p>\n')
    if answer := _chapter(name).answer(found):
        parts.append(f'<p class="answer">{escape(answer)}</p>\n<p class="origin">{_origin(work)}</p>\n')
    if not work:
        parts.append(f'<p class="muted">{_how_to_run(name)}</p>\n')
    return f'<section id="{name}">\n{"".join(parts)}{_figures(mine, _chapter(name).lead)}</section>\n'


def _figures(cards: Sequence[Card], lead: str) -> str:
    """Show the figure that carries the answer, of every dataset and device; the others unfold."""
    shown = [card for card in cards if card.figure == lead] or list(cards[:1])
    others = [card for card in cards if card not in shown]
    first = "".join(_figure(card) for card in shown)
    if not others:
        return first
    count = f"{len(others)} more figure" + "s" * (len(others) > 1)
    rest = "".join(_figure(card, source="data-src") for card in others)
    return f"{first}<details>\n<summary>{count}</summary>\n{rest}</details>\n"


def _figure(card: Card, source: str = "src") -> str:
    """Return a frame with a figure; with `data-src` it is loaded by `_UNFOLD`."""
    address = f"{card.name}.html"
    return (
        f'<figure>\n<iframe {source}="{address}" title="{escape(card.title)}" height="{card.height}" '
        f'loading="lazy"></iframe>\n<figcaption>{_origin(card.records)} '
        f'<a href="{address}">Open alone</a></figcaption>\n</figure>\n'
    )


def _origin(records: Sequence[Record]) -> str:
    """Say on what the numbers were made: device, profile, data, day; a smoke run stands out."""
    where = "; ".join(
        f"{kind} on {_counted((_device(r) for r in records if r['kind'] == kind), 'devices')}"
        for kind in _distinct(record["kind"] for record in records)
    )
    versions: dict[str, list[str]] = {}
    for source in (record.get("data") for record in records):
        if source:
            versions.setdefault(str(source.get("name")), []).append(str(source.get("fingerprint")))
    data = ", ".join(f"{name} {_counted(versions[name], 'versions')}" for name in sorted(versions)) or "none"
    names = {record["profile"] for record in records}
    profiles = sorted(profile(name) for name in names)
    smoke = '<span class="smoke">smoke run, not a result</span> ' if "smoke" in names else ""
    return (
        f"{smoke}{escape(where[:1].upper() + where[1:])}, {' and '.join(profiles)}, data {escape(data)}, "
        f"<time>{max(record['time'] for record in records)[:10]}</time>."
    )


def _device(record: Record) -> str:
    return f"{record['device']['name']} ({record['label']})"


def _counted(texts: Iterable[str], what: str) -> str:
    """Return texts, each once, where they are few, else how many of `what` there are."""
    found = _distinct(texts)
    return ", ".join(found) if len(found) <= FEW else f"{len(found)} {what}"


def _distinct(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts))


def _how_to_run(name: str) -> str:
    if name in NOTEBOOKS:
        command = f"python -m reclib.study run {name[:2]} --profile quick"
        return f"No record of this notebook is here yet. To make one: <code>{command}</code>"
    command = f"<code>make lab</code>, then <code>{name}.ipynb</code>"
    return f"This notebook is for a person, not for a batch: {command}"


def _heading(name: str, asked: Mapping[str, Question]) -> str:
    return (asked[name].heading if name in asked else "") or _chapter(name).title


def _chapter(name: str) -> Chapter:
    return CHAPTERS.get(name) or Chapter(name[3:].replace("_", " ").capitalize(), lambda _: "")


def _inline(markdown: str) -> str:
    """Return a paragraph of Markdown as HTML: emphasis and code; of links the text alone."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", escape(markdown))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"(?<!\*)\*([^*]+)\*(?!\*)", r"<em>\1</em>", text)
