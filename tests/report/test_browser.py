"""What people open, opened as they do: the page of figures in headless Chromium.

Skipped where there is no Chromium: RECLIB_CHROMIUM names one, else it is looked for on PATH.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import CHROMIUM, NO_CHROMIUM, started
from conftest import ROOT

WAIT = 120_000  # milliseconds: a loaded machine of two cores takes most of a minute for a page of figures
TRACES = ".main-svg .trace, .main-svg .point"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as chromium:
        yield chromium


@contextlib.contextmanager
def opened(browser: Any, **looks: Any) -> Iterator[tuple[Any, list[str]]]:
    """Yield a page and the list that its errors are added to."""
    context = browser.new_context(**looks)
    page, errors = context.new_page(), []
    page.set_default_timeout(WAIT)
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The folder of figures behind a static server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(ROOT / "figures"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def test_the_page_of_figures_reads_on_a_phone_in_the_dark_without_a_server(browser):
    with opened(browser, viewport={"width": 390, "height": 800}, color_scheme="dark") as (page, errors):
        page.goto((ROOT / "figures/index.html").as_uri(), wait_until="domcontentloaded")
        page.frame_locator("iframe >> nth=0").locator(TRACES).first.wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(part) for part in paper.removeprefix("rgb(").rstrip(")").split(",")) < 64, paper
        folded = page.locator("details.more").first.locator("iframe").first
        assert folded.get_attribute("src") is None
        page.locator("details.more > summary").first.click()
        folded.content_frame.locator(TRACES).first.wait_for(state="attached")
        plot = folded.content_frame.locator(".main-svg").first
        assert 300 < plot.evaluate("drawn => drawn.getBoundingClientRect().width") <= 390
        assert errors == []


def test_the_page_of_figures_reads_from_a_server_and_by_the_keyboard(browser, served):
    with opened(browser, viewport={"width": 1280, "height": 900}, color_scheme="light") as (page, errors):
        page.goto(served, wait_until="domcontentloaded")
        page.frame_locator("iframe >> nth=0").locator(TRACES).first.wait_for(state="attached")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "A"  # past the figure, to the questions
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash").startswith("#")
        assert [said for said in errors if "favicon" not in said and "404" not in said] == []
