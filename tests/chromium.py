"""The Chromium that the browser tests drive."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = os.environ.get("RECLIB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
NO_CHROMIUM = "no Chromium: install Debian's chromium, or name one in RECLIB_CHROMIUM"


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
