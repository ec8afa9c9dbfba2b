"""The notebooks as a person has them: in JupyterLab, in a browser.

The one with controls and the first are run from their first cell to their last. The others are opened with
the outputs that are stored in them; `test_notebooks.py` tells whether those are what running them gives.

A server of the project's environment on loopback with its token, on a copy of the notebooks. Skipped where
there is no Chromium.
"""

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
from chromium import needs_chromium, opened, started
from conftest import ROOT

NOTEBOOKS = [file.stem for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
RUN = ("01_data_prep", "07_explore")  # without stored outputs; the second has the controls
LIMIT = 600  # seconds for one notebook on a loaded machine of two cores; an idle one takes 10 to 40
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = [pytest.mark.slow, needs_chromium]

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
      done: model.type !== "code" || (model.executionCount > 0 && model.executionState !== "running"),
      kinds: outputs.flatMap(output => Object.keys(output.data || {})),
      // A figure of nothing says so in its title and has no mark.
      marks: outputs.flatMap(({data}) => ((data || {})["application/vnd.plotly.v1+json"] || {data: []}).data)
        .some(trace => !trace.x || (trace.x.bdata || trace.x).length > 0),
      errors: outputs.filter(({output_type}) => output_type === "error").map(e => e.ename + ": " + e.evalue),
    };
  });
  return {idle: Boolean(session && session.kernel && session.kernel.status === "idle"), cells};
}"""
IDLE = f"() => (({STATE})() || {{}}).idle"
ENDED = f"""() => {{
  const state = ({STATE})();
  return state.idle && (state.cells.every(cell => cell.done) || state.cells.some(cell => cell.errors.length));
}}"""
SCROLL = "index => window.jupyterapp.shell.currentWidget.content.scrollToItem(index, 'start')"
CELL = "window.jupyterapp.shell.currentWidget.content.widgets[index].node"
# Marks of a figure: of axes and of heat maps.
MARKS = ", ".join(f".main-svg {mark}" for mark in (".trace", ".point", ".hm"))
DRAWN = f"index => {CELL}.querySelectorAll('{MARKS}').length > 0"
TEXT = f"index => [...{CELL}.querySelectorAll('.widget-output')].map(output => output.innerText).join()"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks; yields its address, with the token."""
    place = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", place / "notebooks", ignore=shutil.ignore_patterns(".ipynb_*"))
    for file in (place / f"notebooks/{name}.ipynb" for name in RUN):
        notebook = nbformat.read(file, 4)
        for cell in notebook.cells:
            cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
        nbformat.write(notebook, file)
    folders = [f"JUPYTER_{kind}_DIR" for kind in ("CONFIG", "DATA", "RUNTIME")]
    folders += ["RECLIB_RECORDS", "RECLIB_RUNS"]
    own = {name: str(place / name) for name in folders} | {"HOME": str(place), "RECLIB_ROOT": str(ROOT)}
    own |= {"RECLIB_DATA": os.environ.get("RECLIB_DATA", str(ROOT / ".data"))}
    options = "--no-browser --ip 127.0.0.1 --port 0 --allow-root --LabApp.news_url=None"
    options += " --expose-app-in-browser"
    command = [sys.executable, "-m", "jupyter", "lab", *options.split(), "notebooks"]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=place, env=os.environ | own, stdout=log, stderr=log)
        try:
            yield _address(place, server)
        finally:
            server.terminate()
            server.wait(60)


def _address(place: Path, server: subprocess.Popen) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        for file in (place / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                server_info = json.loads(file.read_text())
                assert server_info["hostname"] == "127.0.0.1"
                token = server_info["token"]
                assert len(token) >= 32
                return f"{server_info['url']}lab/workspaces/{{name}}/tree/{{name}}.ipynb?reset&token={token}"
        time.sleep(0.2)
    raise AssertionError((place / "server.log").read_text()[-3000:])


def shown(page: Any, index: int) -> Any:
    """Bring the outputs of a cell into sight and return them."""
    page.evaluate(SCROLL, index)
    return page.locator(f".jp-Cell[data-windowed-list-index='{index}'] .jp-OutputArea").first


def comes_true(page: Any, condition: str, given: Any, seconds: int) -> bool:
    with contextlib.suppress(Exception):  # it says which cell, and the others are still seen
        page.wait_for_function(condition, arg=given, timeout=1000 * seconds)
        return True
    return False


def slider_moves_a_number(page: Any, index: int) -> bool:
    slider = shown(page, index).locator("[role=slider]").first
    if not slider.count():
        return True
    before = page.evaluate(TEXT, index)
    slider.focus()
    changed = f"([index, before]) => ({TEXT})(index) !== before"
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):  # one of them is not at the end of the scale
        page.keyboard.press(key)
        if comes_true(page, changed, [index, before], 30):
            return True
    return False


def test_every_notebook_shows_in_jupyterlab_what_it_should(lab: str):
    with started() as browser:
        for name in NOTEBOOKS:
            with opened(browser, viewport={"width": 1280, "height": 1000}) as (page, errors):
                page.goto(lab.format(name=name), wait_until="domcontentloaded")
                page.wait_for_function(IDLE)
                if name in RUN:
                    for item in ("Run", "Run All Cells"):
                        page.get_by_role("menuitem", name=item, exact=True).click()
                    assert comes_true(page, ENDED, None, LIMIT), f"{name} did not end"
                cells = page.evaluate(STATE)["cells"]
                assert [error for cell in cells for error in cell["errors"]] == [], name
                assert all(cell["done"] for cell in cells), name
                figures = [i for i, cell in enumerate(cells) if PLOTLY in cell["kinds"] and cell["marks"]]
                assert figures, name
                for i in figures:
                    shown(page, i)
                    assert comes_true(page, DRAWN, i, 60), f"{name}: cell {i} has a figure without a mark"
                widgets = [i for i, cell in enumerate(cells) if WIDGET in cell["kinds"]]
                assert bool(widgets) == (name == "07_explore"), name
                for i in widgets:
                    assert slider_moves_a_number(page, i), f"{name}: a slider of cell {i} changes nothing"
                assert errors == [], name
