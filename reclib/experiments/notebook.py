"""Opening a notebook, recording its results, and showing its figures and findings.

`study = open_notebook("02_baseline", globals())` checks the parameters and begins the notebook's records;
`study.p`, `study.device` and `study.dataset` follow from them. `study.record(*results)` appends results to
the records and shows one table, `study.show("protocols")` draws a figure of them, and `study.findings()`
prints their findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from reclib import hardware, parameters, records
from reclib.data.dataset import Dataset
from reclib.data.prepare import prepare
from reclib.records import Record
from reclib.report import findings
from reclib.report.tables import by

if TYPE_CHECKING:  # benchmarks use `Result` on machines without plotly
    import plotly.graph_objects as go

_NONE: dict[str, Any] = {}  # a default, never changed
MOST_ROWS = 30  # of a table of results; longer tables have a row for each name


class Result(NamedTuple):
    """One result: the arguments of `records.Run.result`."""

    name: str
    metrics: dict[str, Any]  # the same in every run on one machine
    params: dict[str, Any] = _NONE
    series: dict[str, list[Any]] = _NONE
    seed: int | None = None
    timings: dict[str, Any] = _NONE  # numbers that depend on the clock
    kind: records.Kind = "measured"
    device: Mapping[str, Any] | None = None  # the card of a predicted device


class Recorded(list[Record]):
    """Records of one call. As the last value of a cell they show nothing: their table is shown already."""

    def _ipython_display_(self) -> None:
        pass


@dataclass
class Study:
    """One run of a notebook."""

    notebook: str
    p: Any  # the notebook's dataclass of `parameters`, filled from the device file
    device: hardware.Device
    dataset: Any  # a Dataset; None for a notebook without one
    run: records.Run
    records: list[dict[str, Any]] = field(default_factory=list)  # of this run

    def record(self, *results: Result) -> Recorded:
        """Record results and show them in one table; return their records."""
        from IPython.utils.capture import capture_output

        with capture_output(stdout=False, stderr=False):  # hide the line of each, which the table repeats
            new = Recorded(self.run.result(**result._asdict()) for result in results)
        self.records = records.latest([*self.records, *new])  # a cell run again replaces its records
        if new:
            _display(new)
        return new

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return this run's records of a name."""
        return [row for row in self.records if row["name"] == name]

    @cached_property
    def _committed(self) -> list[dict[str, Any]]:
        return [row for row in records.committed() if row["data"]]

    def committed(self, name: str = "", grid: str = "") -> list[dict[str, Any]]:
        """Return the newest committed records of grids, optionally of one name or grid."""
        rows = [row for row in self._committed if name in ("", row["name"])]
        return [row for row in rows if grid in ("", row["data"]["name"])]

    def show(self, figure: str, rows: Iterable[Mapping[str, Any]] | None = None) -> go.Figure | str:
        """Return a figure of `figures.FIGURES` for these rows or this run's; a sentence if there are none."""
        from reclib.report import figures

        needs = next(spec.needs for spec in figures.FIGURES if spec.name == figure)
        figure_rows = [*(self.rows(needs) if rows is None else rows)]
        return figures.show(figure, *figure_rows) if figure_rows else f"{figure}: nothing is recorded yet."

    def findings(self, *lines: str) -> None:
        """Print the findings of this run's records, then these lines."""
        if parameters.profile_of(self.notebook, self.p) == "smoke":
            print("Smoke run, not a result: it shows that everything works, and nothing else.")
        sentences = (f"- {sentence}" for sentence in findings.sentences(self.notebook, self.records))
        print(*sentences, *lines, sep="\n")


def open_notebook(
    notebook: str,
    namespace: Mapping[str, Any],
    data: Callable[[Any], Dataset | Mapping[str, str]] | None = None,
) -> Study:
    """Open a notebook: check its parameters, find the device, prepare the data, begin its records.

    `namespace` is the notebook's `globals()` right after its parameters cell: other plain values in it are
    taken for misspelt parameters. `data` makes the dataset from the parameters, or returns name and
    fingerprint of other data; by default the parameters name the dataset. Device, profile and data are
    printed. Raises `InputError` for invalid parameters.
    """
    stated = parameters.read(notebook, namespace)
    device = hardware.resolve(stated.gpu)
    p = parameters.fill(stated, device.label)
    histories = prepare(p.data_config()) if data is None else data(p)
    dataset = histories if isinstance(histories, Dataset) else None
    origin: Any = histories if dataset is None else {"name": dataset.name, "fingerprint": dataset.fingerprint}
    run = records.Run(notebook, p, hardware.device_card(device), origin)

    pd.set_option("display.max_rows", None)  # a table is shown whole
    print(f"Device: {device.label}, {device.card.name}.", end=" ")
    if hasattr(p, "precision"):
        choice = hardware.choose_precision(p.precision or "auto", device.card)
        print(f"Precision: {choice.name} ({choice.reason}).", end=" ")
    print(f"Profile: {parameters.profile_of(notebook, p)}.")
    if not device.is_claimed:
        print(f"{p.gpu} was asked for and is not here: everything measured below is of {device.label}.")
    before, after = parameters.values(stated), parameters.values(p)
    if filled := [f"{name}={value!r}" for name, value in after.items() if before[name] != value]:
        print(f"From params/gpu/{device.label}.yaml: {', '.join(filled)}.")
    if dataset is not None:
        counts = f"{dataset.num_users:,} users, {dataset.num_items:,} items"
        print(f"Data: {dataset.name}, {counts}, {dataset.num_interactions:,} interactions;", end=" ")
        print(f"fingerprint {dataset.fingerprint[:12]}.")
    return Study(notebook, p, device, dataset, run)


def _display(new: Sequence[Record]) -> None:
    """Show records as one table, with the name and numbers of each for the notebook tests."""
    from IPython.display import display

    bundle = []
    for row in new:
        numbers = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row["metrics"].items()}
        entry = {"name": row["name"], "params": row["own_params"], "metrics": numbers}
        bundle.append(entry | ({} if row["seed"] is None else {"seed": row["seed"]}))
    table = _table(bundle)
    with pd.option_context("display.max_colwidth", None):
        outputs = {"text/plain": table.to_string(), "text/html": table.to_html(border=0)}
    display({records.MIME: bundle} | outputs, raw=True)


def _table(bundle: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each result, or for each name if there are several names or too many rows."""
    by_name = by(bundle, lambda row: row["name"])
    if len(by_name) > 1 or len(bundle) > MOST_ROWS:
        lines = {}
        for name, rows in by_name.items():
            numbers = [f"{key} {_text(value)}" for key, value in rows[0]["metrics"].items()]
            lines[name] = [len(rows), ", ".join(numbers if len(rows) == 1 else rows[0]["metrics"])]
        return pd.DataFrame.from_dict(lines, orient="index", columns=["recorded", "metrics"])
    rows = [{**row["params"], "seed": row.get("seed"), **row["metrics"]} for row in bundle]
    table = pd.DataFrame(rows, index=[row["name"] for row in bundle], dtype=object).dropna(axis=1, how="all")
    table = table.map(_text)
    return table.T if len(bundle) == 1 else table


def _text(value: Any) -> str:
    """Return a number with thousands separators, "" for a missing value."""
    if value is None or value != value:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
