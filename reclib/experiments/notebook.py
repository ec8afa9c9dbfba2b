"""The opening of every notebook, and how it records, draws and sums up.

`study = open_notebook("02_baseline", globals())` checks the parameters and begins the notebook's records;
`study.p`, `study.device` and `study.dataset` are what they ask for. `study.record(*results)` appends results
to the records and shows one table, `study.show("protocols")` draws a figure of them, and `study.findings()`
prints the sentences that they allow.
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

if TYPE_CHECKING:  # what measures needs `Result` where no plotly is installed
    import plotly.graph_objects as go

_NONE: dict[str, Any] = {}  # a default, never changed
MOST_ROWS = 30  # of the table of a call; results of several names are listed by name alone


class Result(NamedTuple):
    """One result: the arguments of `records.Run.result`."""

    name: str
    metrics: dict[str, Any]  # the same in every run on one machine
    params: dict[str, Any] = _NONE
    series: dict[str, list[Any]] = _NONE
    seed: int | None = None
    timings: dict[str, Any] = _NONE  # what depends on the clock
    kind: records.Kind = "measured"
    device: Mapping[str, Any] | None = None  # the card that a prediction is for


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
    dataset: Any  # a Dataset; None where the notebook has no data of its own
    run: records.Run
    records: list[dict[str, Any]] = field(default_factory=list)  # of this run

    def record(self, *results: Result) -> Recorded:
        """Record results and show them in one table; return their records."""
        new = Recorded(self._recorded(result) for result in results)
        self.records = records.latest([*self.records, *new])  # a cell that is run again replaces its own
        if new:
            _display(new)
        return new

    def _recorded(self, result: Result) -> Record:
        from IPython.utils.capture import capture_output

        with capture_output(stdout=False, stderr=False):  # its own line: the table of the call has it
            return self.run.result(**result._asdict())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return this run's records of a name."""
        return [row for row in self.records if row["name"] == name]

    @cached_property
    def _committed(self) -> list[dict[str, Any]]:
        return [row for row in records.committed() if row["data"]]

    def committed(self, name: str = "", grid: str = "") -> list[dict[str, Any]]:
        """Return the newest committed records of grids; of one name, of one grid, where these are given."""
        rows = [row for row in self._committed if name in ("", row["name"])]
        return [row for row in rows if grid in ("", row["data"]["name"])]

    def show(self, figure: str, rows: Iterable[Mapping[str, Any]] | None = None) -> go.Figure | str:
        """Return a figure of `figures.FIGURES`, of these rows or of this run's; a sentence without rows."""
        from reclib.report import figures

        needs = next(spec.needs for spec in figures.FIGURES if spec.name == figure)
        drawn = [*(self.rows(needs) if rows is None else rows)]
        return figures.show(figure, *drawn) if drawn else f"{figure}: nothing is recorded yet."

    def findings(self, *lines: str) -> None:
        """Print what this run's records say, and further lines as they are."""
        if parameters.profile_of(self.notebook, self.p) == "smoke":
            print("Smoke run, not a result: it shows that everything works, and nothing else.")
        own = (f"- {sentence}" for sentence in findings.sentences(self.notebook, self.records))
        print(*own, *lines, sep="\n")


def open_notebook(
    notebook: str,
    namespace: Mapping[str, Any],
    data: Callable[[Any], Dataset | Mapping[str, str]] | None = None,
) -> Study:
    """Open a notebook: check its parameters, find the device, prepare the data, begin its records.

    `namespace` is the notebook's `globals()`, right after its cell of parameters: a plain value that is
    imported or assigned before counts as a parameter, and as a misspelt one. `data` makes the dataset of the
    parameters, or returns the name and fingerprint of data that are no dataset; None: the parameters name
    it. What is there and what was asked for is printed. Raises `InputError` for what cannot be.
    """
    given = parameters.read(notebook, namespace)
    device = hardware.resolve(given.gpu)
    p = parameters.fill(given, device.label)
    histories = (data or _dataset)(p)
    dataset = histories if isinstance(histories, Dataset) else None
    about: Any = histories
    if dataset is not None:
        about = {"name": dataset.name, "fingerprint": dataset.fingerprint}
    run = records.Run(notebook, p, hardware.device_card(device), about)

    pd.set_option("display.max_rows", None)  # a table is shown whole
    print(f"Device: {device.label}, {device.card.name}.", end=" ")
    if hasattr(p, "precision"):
        choice = hardware.choose_precision(p.precision or "auto", device.card)
        print(f"Precision: {choice.name} ({choice.reason}).", end=" ")
    print(f"Profile: {parameters.profile_of(notebook, p)}.")
    if not device.is_claimed:
        print(f"{p.gpu} was asked for and is not here: everything measured below is of {device.label}.")
    before, after = parameters.values(given), parameters.values(p)
    if filled := [f"{name}={value!r}" for name, value in after.items() if before[name] != value]:
        print(f"From params/gpu/{device.label}.yaml: {', '.join(filled)}.")
    if dataset is not None:
        counts = f"{dataset.num_users:,} users, {dataset.num_items:,} items"
        print(f"Data: {dataset.name}, {counts}, {dataset.num_interactions:,} interactions;", end=" ")
        print(f"fingerprint {dataset.fingerprint[:12]}.")
    return Study(notebook, p, device, dataset, run)


def _dataset(p: Any) -> Dataset:
    return prepare(p.data_config())


def _display(new: Sequence[Record]) -> None:
    """Show records as one table; beside it, for the notebook tests, name and numbers of each."""
    from IPython.display import display

    bundle = []
    for row in new:
        numbers = {key: _three_digits(value) for key, value in row["metrics"].items()}
        own = {"name": row["name"], "params": row["own_params"], "metrics": numbers}
        bundle.append(own | ({} if row["seed"] is None else {"seed": row["seed"]}))
    table = _table(bundle)
    with pd.option_context("display.max_colwidth", None):
        shown = {"text/plain": table.to_string(), "text/html": table.to_html(border=0)}
    display({records.MIME: bundle} | shown, raw=True)


def _table(bundle: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each result; for each name where there are several names or too many rows."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in bundle:
        by_name.setdefault(row["name"], []).append(row)
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


def _three_digits(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _text(value: Any) -> str:
    """Return a number as a reader wants it: thousands marked, nothing for what is missing."""
    if value is None or value != value:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
