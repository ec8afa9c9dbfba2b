"""What people open, opened as they do: the page of figures in headless Chromium.

Skipped where there is no Chromium: RECLIB_CHROMIUM names one, else it is looked for on PATH.
"""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from chromium import needs_chromium, opened, started
from conftest import ROOT

TRACES = ".main-svg .trace, .main-svg .point"
pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as chromium:
        yield chromium


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


def test_the_page_of_figures_reads_from_a_server_and_by_the_keyboard(browser):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(ROOT / "figures"))
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        opened(browser, viewport={"width": 1280, "height": 900}, color_scheme="light") as (page, errors),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html", wait_until="domcontentloaded")
        page.frame_locator("iframe >> nth=0").locator(TRACES).first.wait_for(state="attached")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "A"  # past the figure, to the questions
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash").startswith("#")
        assert [error for error in errors if "favicon" not in error and "404" not in error] == []
        server.shutdown()
