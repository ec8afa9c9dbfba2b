"""The notebooks as a person has them: in JupyterLab, in a browser.

The one with controls and the first are run from their first cell to their last. The others are opened with
the outputs that are stored in them; `test_notebooks.py` tells whether those are what running them gives.

A server of the project's environment on loopback with its token, on a copy of the notebooks, two pages at a
time. Skipped where there is no Chromium.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from chromium import CHROMIUM, NO_CHROMIUM, started
from conftest import ROOT

NOTEBOOKS = [file.stem for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
RUN = ("01_data_prep", "07_explore")  # without stored outputs; the second has the controls
AT_ONCE = 2
LIMIT = 600  # seconds for one notebook on a loaded machine of two cores; an idle one takes 10 to 40
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]

# The open notebook, asked of JupyterLab itself: cells out of sight are not in the page.
STATE = """() => {
  const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  if (!panel || !panel.content || !panel.content.model) return null;
  const session = panel.sessionContext.session;
  const cells = panel.content.widgets.map(cell => {
    const model = cell.model, outputs = [];
    const count = model.outputs ? model.outputs.length : 0;
    for (let i = 0; i < count; i++) outputs.push(model.outputs.get(i).toJSON());
    return {
      code: model.type === "code",
      done: model.executionCount > 0 && model.executionState !== "running",
      kinds: outputs.flatMap(one => Object.keys(one.data || {})),
      // A figure of nothing says so in its title and has no mark.
      marks: outputs.flatMap(one => ((one.data || {})["application/vnd.plotly.v1+json"] || {data: []}).data)
        .some(trace => !trace.x || (trace.x.bdata || trace.x).length > 0),
      errors: outputs.filter(one => one.output_type === "error").map(one => one.ename + ": " + one.evalue),
    };
  });
  return {kernel: session && session.kernel ? session.kernel.status : "none", cells};
}"""
SCROLL = "index => window.jupyterapp.shell.currentWidget.content.scrollToItem(index, 'start')"
CELL = "window.jupyterapp.shell.currentWidget.content.widgets[index].node"
# Marks of a figure: of axes, of heat maps, and of parallel coordinates, which are no traces of an axis.
MARKS = ", ".join(f".main-svg {mark}" for mark in (".trace", ".point", ".hm", ".parcoords .axis"))
DRAWN = f"index => {CELL}.querySelectorAll('{MARKS}').length > 0"
SAID = f"index => [...{CELL}.querySelectorAll('.widget-output')].map(one => one.innerText).join()"
CONTROLS = "select, input:not([type=hidden]), textarea, button, [role=slider]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks; yields its address, with the token."""
    place = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        ROOT / "notebooks", place / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    for file in (place / f"notebooks/{name}.ipynb" for name in RUN):
        notebook = nbformat.read(file, 4)
        for cell in notebook.cells:
            cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
        nbformat.write(notebook, file)
    own = {f"JUPYTER_{name}_DIR": str(place / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {
        "RECLIB_ROOT": str(ROOT),
        "RECLIB_RECORDS": str(place / "records"),
        "RECLIB_RUNS": str(place / "runs"),
    }
    own |= {"PYTHONPATH": str(ROOT), "HOME": str(place)}
    own |= {"RECLIB_DATA": os.environ.get("RECLIB_DATA", str(ROOT / ".data"))}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip", "127.0.0.1", "--port", "0"]
    command += ["--allow-root", "--expose-app-in-browser", "--LabApp.news_url=None", "notebooks"]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=place, env=os.environ | own, stdout=log, stderr=log)
        try:
            yield _address(place, server)
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()


def _address(place: Path, server: subprocess.Popen) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        for file in (place / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(file.read_text())
                assert said["hostname"] == "127.0.0.1"
                assert len(said["token"]) >= 32
                return f"{said['url']}lab/workspaces/{{name}}/tree/{{name}}.ipynb?reset&token={said['token']}"
        time.sleep(0.2)
    raise AssertionError((place / "server.log").read_text()[-3000:])


class Page:
    """One notebook in one tab."""

    def __init__(self, browser: Any, address: str, name: str) -> None:
        self.name, self.said, self.begun = name, list[str](), time.monotonic()
        self.context = browser.new_context(viewport={"width": 1280, "height": 1000})
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda said: self.said.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address.format(name=name), wait_until="domcontentloaded")
        self.page.wait_for_function(f"() => (({STATE})() || {{}}).kernel === 'idle'")
        if name in RUN:
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def state(self) -> dict[str, Any]:
        """Return what JupyterLab says of the kernel and each cell."""
        return self.page.evaluate(STATE)

    def ended(self) -> bool:
        """Whether all cells ran, one failed, or it takes too long."""
        if time.monotonic() - self.begun > LIMIT:
            return True
        state = self.state()
        cells = [cell for cell in state["cells"] if cell["code"]]
        through = all(cell["done"] for cell in cells) or any(cell["errors"] for cell in cells)
        return through and state["kernel"] == "idle"

    def look(self) -> dict[str, Any]:
        """Scroll through what it shows; return what failed and what was found, and close the tab."""
        cells = self.state()["cells"]
        found: dict[str, Any] = {
            "errors": [error for cell in cells for error in cell["errors"]],
            "not run": [i for i, cell in enumerate(cells) if cell["code"] and not cell["done"]],
            "figures": [i for i, cell in enumerate(cells) if PLOTLY in cell["kinds"] and cell["marks"]],
            "widgets": [i for i, cell in enumerate(cells) if WIDGET in cell["kinds"]],
        }
        found["not drawn"] = [i for i in found["figures"] if not self._is_drawn(i)]
        found["out of reach"] = [i for i in found["widgets"] if not self._all_controls_are_reached(i)]
        found["without effect"] = [i for i in found["widgets"] if not self._slider_moves_a_number(i)]
        found["console"] = self.said
        self.context.close()
        return found

    def _is_drawn(self, index: int) -> bool:
        self.page.evaluate(SCROLL, index)
        with contextlib.suppress(Exception):  # it says which cell, and the other notebooks are still seen
            self.page.wait_for_function(DRAWN, arg=index, timeout=60_000)
            return True
        return False

    def _cell(self, index: int) -> Any:
        """Bring a cell into sight and return it."""
        self.page.evaluate(SCROLL, index)
        return self.page.locator(f".jp-Cell[data-windowed-list-index='{index}'] .jp-OutputArea").first

    def _slider_moves_a_number(self, index: int) -> bool:
        slider = self._cell(index).locator("[role=slider]").first
        if not slider.count():
            return True
        before = self.page.evaluate(SAID, index)
        slider.focus()
        for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):  # one of them is not at the end of the scale
            self.page.keyboard.press(key)
            with contextlib.suppress(Exception):
                changed = f"([index, before]) => ({SAID})(index) !== before"
                self.page.wait_for_function(changed, arg=[index, before], timeout=30_000)
                return True
        return False

    def _all_controls_are_reached(self, index: int) -> bool:
        controls = self._cell(index).locator(CONTROLS).filter(visible=True)
        count = controls.count()
        if not count:
            return True
        controls.first.focus()
        reached = set[str]()
        controls.evaluate_all("all => all.forEach((one, i) => one.dataset.place = i)")
        for _ in range(2 * count + 10):
            place = self.page.evaluate("document.activeElement.dataset.place")
            reached |= {place} - {None}
            if len(reached) == count:
                return True
            self.page.keyboard.press("Tab")
        return False


@pytest.fixture(scope="module")
def seen(lab: str) -> dict[str, dict[str, Any]]:
    """What every notebook showed, two at a time, those that are run first."""
    left = sorted(NOTEBOOKS, key=RUN.__contains__)
    running: list[Page] = []
    found = {}
    with started() as browser:
        while left or running:
            while left and len(running) < AT_ONCE:
                running.append(Page(browser, lab, left.pop()))
            for page in [page for page in running if page.ended()]:
                running.remove(page)
                found[page.name] = page.look()
            time.sleep(0.2)
    return found


def test_every_notebook_shows_in_jupyterlab_what_it_should(seen):
    assert seen.keys() == set(NOTEBOOKS)
    assert [name for name in RUN if seen[name]["widgets"]]
    for name, found in seen.items():
        assert found["errors"] == [], name
        assert found["not run"] == [], name
        assert found["figures"], name
        assert found["not drawn"] == [], f"{name}: figures without a mark"
        assert found["out of reach"] == [], f"{name}: controls that Tab does not come to"
        assert found["without effect"] == [], f"{name}: sliders that change nothing"
        assert found["console"] == [], name
