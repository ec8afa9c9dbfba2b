"""The index page of the figures: each notebook's question, its answer from the records, its figures.

Plain HTML and CSS in one file, readable without network, light or dark as the reader's system is. A section
stands for every notebook that is there, with its question in the notebook's own words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

from reclib.config import InputError
from reclib.cost import planner
from reclib.evaluate.statistics import Claim, claim
from reclib.parameters import NOTEBOOKS
from reclib.report import tables
from reclib.report.tables import ARM_NAMES, TASK_NAMES, Record, best_work, model_name, profile, sweep_of

# ------------------------------------------------------------------------------------------------
# What the records of each notebook answer to its question, in a sentence or two, with the measured numbers.
#
# Pure functions from records to text. To add a notebook: a function, and a line in `CHAPTERS`; its question
# and its first paragraph are read from the notebook itself.

Found = Mapping[str, Sequence[Record]]  # by name of the result, those of the work that its figure shows


@dataclass(frozen=True)
class Chapter:
    """A notebook's place on the page: its short title, its answer, and the figure that shows most of it."""

    title: str
    answer: Callable[[Found], str]  # "" where the records say nothing
    lead: str = ""  # name of a figure; "" for the first


def _data_answer(found: Found) -> str:
    said = []
    for record in found.get("preparation", []):
        m = record["metrics"]
        said.append(
            f"{_dataset(record)} keeps {m['interactions']:,} of {m['source_interactions']:,} interactions, "
            f"of {m['users']:,} users and {m['items']:,} items."
        )
    for record in found.get("last_items", []):
        share = record["metrics"]["last_item_by_tie_rule_share"]
        said.append(
            f"On {_dataset(record)} {share:.0%} of the users have several items with the last timestamp: "
            "there only the order of rows decides the test target."
        )
    return " ".join(said)


def _baseline_answer(found: Found) -> str:
    """Return for each dataset and device: HR@10 of BERT4Rec, and which models are better or worse."""
    scored: dict[tuple[str, str], dict[str, Record]] = {}
    for record in found.get("test_metrics", []):
        model = (record.get("own_params") or {}).get("model")
        if model is None or "hr@10" not in record["metrics"]:
            continue
        models = scored.setdefault(_place(record), {})
        if model not in models or record.get("seed") is None:  # the mean over seeds has none
            models[model] = record
    sentences = []
    for place, models in scored.items():
        best_first = sorted(models, key=lambda name: -models[name]["metrics"]["hr@10"])
        compared = [r for r in found.get("comparison", []) if _place(r) == place]
        against, said = _compared(compared, models)
        named = [against] if against else best_first
        numbers = ", ".join(_with_interval(name, models[name]["metrics"]) for name in named)
        sentences.append(f"HR@10 on {place[0]} ({place[1]}): {numbers}.{said}")
    return " ".join(sentences)


def _compared(records: Sequence[Record], models: Mapping[str, Record]) -> tuple[str, str]:
    """Return the model that the others are compared with by HR@10, and what is claimed of each of them."""
    by_claim: dict[str, list[str]] = {word: [] for word in get_args(Claim)}
    against = seeds = ""
    for record in records:
        own, m = record["own_params"], record["metrics"]
        if own["metric"] != "hr@10" or own["model"] not in models or own["against"] not in models:
            continue
        against = own["against"]
        seeds = f"{m['reference_seeds']:.0f} seed" + "s" * (m["reference_seeds"] != 1)
        claimed = claim(m["difference"], m["adjusted_p"], (m["seeds"], m["reference_seeds"]))
        by_claim[claimed].append(own["model"])
    parts = []
    for word, names in by_claim.items():
        rated = [(name, models[name]["metrics"]["hr@10"]) for name in names]
        rated.sort(key=lambda pair: -pair[1])
        if rated:
            parts.append(f"{word}: {', '.join(f'{model_name(n)} {value:.3f}' for n, value in rated)}")
    said = f" Over {seeds}, against {model_name(against)}, corrected: {'; '.join(parts)}." if parts else ""
    return against, said


def _with_interval(model: str, metrics: Mapping[str, Any]) -> str:
    said = f"{model_name(model)} {metrics['hr@10']:.3f}"
    if metrics.get("hr@10_low") is None:
        return said
    return f"{said} [{metrics['hr@10_low']:.3f}, {metrics['hr@10_high']:.3f}]"


def _speed_answer(found: Found) -> str:
    """Return for each dataset and device what less work gives, and what precision and compiling do."""
    return " ".join(
        said
        for place in dict.fromkeys(_place(r) for name in ("ladder", "step") for r in found.get(name, []))
        for said in (
            _of_ladder([r for r in found.get("ladder", []) if _place(r) == place]),
            _of_steps([r for r in found.get("step", []) if _place(r) == place], place),
        )
        if said
    )


def _of_ladder(records: Sequence[Record]) -> str:
    rungs = [r for r in records if r["timings"].get("step_seconds")]
    if len(rungs) < 2:
        return ""
    first = min(rungs, key=lambda r: r["own_params"]["rung"])
    best = min(rungs, key=lambda r: r["timings"]["step_seconds"])
    factor = first["timings"]["step_seconds"] / best["timings"]["step_seconds"]
    names = (first["own_params"]["name"], best["own_params"]["name"])
    return f"From the {names[0]} to “{names[1]}” a step is {factor:.1f} times faster ({_place(first)[1]})."


def _of_steps(records: Sequence[Record], place: tuple[str, str]) -> str:
    """Return the rate in fp32, eager, and of every other precision and compile mode as a multiple of it."""
    rates: dict[int, dict[tuple[str, str], float]] = {}
    for record in records:
        own, rate = record["own_params"], record["timings"].get("sequences_per_second")
        if rate and record["kind"] == "measured":
            rates.setdefault(own["batch_size"], {})[own["precision"], own["compile_mode"]] = rate
    plain = ("fp32", "off")
    batches = [batch for batch in sorted(rates) if plain in rates[batch]]
    if not batches:
        return ""
    of_batch = rates[batches[-1]]
    others = {key: rate / of_batch[plain] for key, rate in of_batch.items() if key != plain}
    named = {
        precision if mode == "off" else f"{precision} compiled ({mode})": share
        for (precision, mode), share in others.items()
    }
    said = ", ".join(f"{name} {share:.2f}" for name, share in sorted(named.items(), key=lambda kv: -kv[1]))
    start = f"fp32 eager on {place[0]} at batch {batches[-1]}: {of_batch[plain]:,.0f} sequences/s"
    return f"{start}; as multiples of it: {said}." if said else f"{start}."


def _adapter_answer(found: Found) -> str:
    """Return for each dataset and device what iLoRA's step costs, and by task which arms differ."""
    names = ("adapter_step", "gate_comparison")
    places = dict.fromkeys(_place(record) for name in names for record in found.get(name, []))
    return " ".join(
        said
        for place in places
        for said in (
            *_adapter_steps([r for r in found.get("adapter_step", []) if _place(r) == place]),
            *_gate_claims([r for r in found.get("gate_comparison", []) if _place(r) == place]),
        )
    )


def _adapter_steps(records: Sequence[Record]) -> list[str]:
    return [
        f"A step of iLoRA in {record['own_params']['precision']} takes {record['timings']['over_lora']:.2f} "
        f"times LoRA's and {record['timings']['over_full']:.2f} times full fine-tuning's, on "
        f"{_dataset(record)} ({record['label']})."
        for record in records
        if (record["own_params"]["model"], record["own_params"]["compile_mode"]) == ("ilora", "off")
        and record["timings"].get("over_full")
    ]


def _gate_claims(records: Sequence[Record]) -> list[str]:
    said = []
    for task, name in TASK_NAMES.items():
        by_claim: dict[str, list[str]] = {word: [] for word in get_args(Claim)}
        rows = [r for r in records if r["own_params"]["task"] == task]
        for record in (r for r in rows if r["own_params"]["metric"] == "ndcg@10"):
            m = record["metrics"]
            claimed = claim(m["difference"], m["adjusted_p"], (m["seeds"], m["reference_seeds"]))
            by_claim[claimed].append(ARM_NAMES[record["own_params"]["model"]])
        parts = [f"{word}: {', '.join(arms)}" for word, arms in by_claim.items() if arms]
        if parts:
            start = f"{name[:1].upper()}{name[1:]} of {_dataset(rows[0])}"
            said.append(f"{start}, NDCG@10 against iLoRA, corrected: {'; '.join(parts)}.")
    return said


def _scaling_answer(found: Found) -> str:
    """Return what the newest law of each dataset predicted, and what came, for runs that carry its hash."""
    newest = {_place(r): r for r in sorted(found.get("prediction", []), key=lambda r: str(r["time"]))}
    said = []
    for place, law in newest.items():
        m, of = law["metrics"], law["own_params"]["of"]
        curves = [r for r in found.get("learning_curve", []) if _place(r) == place]
        came = [r for r in curves if (r.get("configuration") or {}).get("prediction") == law["params_hash"]]
        measured = "not measured yet"
        if came:
            seeds = f"{len(came)} seed" + "s" * (len(came) != 1)
            measured = f"{_mean(came, 'lowest_valid_loss'):.3f} measured over {seeds}"
        said.append(
            f"On {place[0]} a law fitted to smaller sizes predicts a validation loss of "
            f"{m['predicted']:.3f} nats for {of}; {measured}{_gained(curves, came)}."
        )
    return " ".join(said)


def _mean(records: Sequence[Record], metric: str) -> float:
    return sum(r["metrics"][metric] for r in records) / len(records)


def _gained(curves: Sequence[Record], largest: Sequence[Record]) -> str:
    """Return what lists of the largest size are worth beside those of the narrowest, to end a sentence."""
    metric = "valid_ndcg@10"
    wide = [r for r in curves if sweep_of(r["own_params"]["model"]) == "width"]
    ranked = [r for r in wide if metric in r["metrics"]]
    if not ranked or not all(metric in r["metrics"] for r in largest) or not largest:
        return ""
    least = min(r["metrics"]["non_embedding"] for r in ranked)
    name = next(r["own_params"]["model"] for r in ranked if r["metrics"]["non_embedding"] == least)
    smallest = [r for r in ranked if r["own_params"]["model"] == name]
    ends = f"{_mean(smallest, metric):.3f} for {name}, {_mean(largest, metric):.3f} for the largest"
    return f"; NDCG@10 on validation is {ends}"


def _device_answer(found: Found) -> str:
    steps = found.get("hardware_step", [])
    if not steps:
        return ""
    planned = [r for r in steps if r["own_params"].get("basis") == "unvalidated"]
    boards = {r["own_params"]["device"] for r in planned}
    long = found.get("real_size_step", [])
    timed = {tables.device_of(r) for r in [*steps, *long] if r["kind"] == "measured"}
    said = [
        f"Measured on {', '.join(sorted(timed)) or 'no device'}; predicted, and unvalidated, for "
        f"{len(boards)} GPUs from their data sheets."
    ]
    own = [r for r in planned if r["own_params"].get("rule") == "open" and r["own_params"]["status"] == "ok"]
    if own:
        size = max(own, key=lambda r: r["metrics"]["flops"])["own_params"]["size"]
        mine = [r for r in own if r["own_params"]["size"] == size]
        ranked = sorted(mine, key=lambda r: r["timings"]["epoch_seconds"])
        ends = [_epoch(one) for one in (ranked[0], ranked[-1])]
        said.append(f"An epoch of {size} takes {ends[0]}, the fastest, and {ends[1]}, the slowest.")
    return " ".join([*said, *_planner_errors()])


def _epoch(record: Record) -> str:
    low, high = (record["timings"][f"epoch_seconds_{end}"] for end in ("low", "high"))
    return f"{low:,.0f} to {high:,.0f} s on {record['own_params']['device']}"


def _planner_errors() -> list[str]:
    """Say how far plans were off on the CPUs where they were tried; of each CPU one sentence."""
    found = {}
    for cpu in planner.cpus().values():
        error = cpu.error
        found[cpu.name] = (
            f"On {error['rows']} runs on {cpu.name} that it had not seen the planner was off by "
            f"{error['time_median']:.0%} in time and {error['memory_median']:.0%} in memory (median)."
        )
    return list(found.values())


def _explore_answer(found: Found) -> str:
    """Return where the run that was asked for fits, and the fastest GPU for it."""
    gpus = [r for r in found.get("plan", []) if r["metrics"].get("fits") is not None]
    fit = [r for r in gpus if r["metrics"]["fits"]]
    if not gpus:
        return ""
    own = gpus[0]["own_params"]
    said = f"{own['size']} at a batch of {own['batch_size']:,} fits on {len(fit)} of {len(gpus)} GPUs"
    if not fit:
        return f"{said} (predicted, unvalidated)."
    best = min(fit, key=lambda r: r["timings"]["epoch_seconds"])
    low, high = (best["timings"][f"epoch_seconds_{end}"] for end in ("low", "high"))
    where = best["own_params"]["device"]
    return f"{said}; fastest is {where}, an epoch in {low:,.3g} to {high:,.3g} s (predicted, unvalidated)."


def _audit_answer(found: Found) -> str:
    return " ".join(
        f"Of {sum(tally.values())} published claims that arithmetic can check: "
        f"{', '.join(f'{verdict} {count}' for verdict, count in sorted(tally.items()))}."
        for tally in (record["metrics"] for record in found.get("audit_verdicts", []))
    )


def _place(record: Record) -> tuple[str, str]:
    return _dataset(record), str(record["label"])


def _dataset(record: Record) -> str:
    return str((record.get("data") or {}).get("name"))


CHAPTERS: dict[str, Chapter] = {
    "01_data_prep": Chapter("The data", _data_answer, "last_items"),
    "02_baseline": Chapter("The baseline", _baseline_answer, "comparison"),
    "03_scaling": Chapter("Scaling", _scaling_answer, "scaling_curve"),
    "04_amp_compile": Chapter("Speed", _speed_answer, "step_ladder"),
    "05_ilora": Chapter("Adapters", _adapter_answer, "gate_comparison"),
    "06_hardware": Chapter("Devices", _device_answer),
    "07_explore": Chapter("Explorer", _explore_answer),
    "08_audit": Chapter("Audit", _audit_answer),
}


# ------------------------------------------------------------------------------------------------

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
        command = f"python -m reclib run {name[:2]} --profile quick"
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
