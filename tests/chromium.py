"""The Chromium that the browser tests drive."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = os.environ.get("RECLIB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: name one in RECLIB_CHROMIUM")
WAIT = 120_000  # milliseconds: a loaded machine of two cores takes most of a minute for a page of figures


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """Yield a headless Chromium; the test is skipped where Playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, since containers run as root have none; nothing but our own pages is opened.
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, **looks: Any) -> Iterator[tuple[Any, list[str]]]:
    """Yield a page and the list that its errors are added to."""
    context, errors = browser.new_context(**looks), list[str]()
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()
