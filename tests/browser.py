"""A headless Chromium for tests of pages: the one that is there, or, on CI as root with apt, Debian's."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str:
    """Path of a Chromium; on CI it is installed first. Skips the test, saying why, where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get"):
        with FileLock(Path(tempfile.gettempdir()) / "stillhouse-chromium.lock"):
            for command in (["apt-get", "update"],
                            ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
                subprocess.run(command, capture_output=True, timeout=300, check=False)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no Chromium on this machine; `apt-get install chromium` lets this test run")
    return found


@contextmanager
def opened(page: Path, width: int = 1200, height: int = 900) -> Iterator:
    """A page opened from file://, with what it wrote to the console and what it asked of the net in `.noise`."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find(), args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.noise = []
        tab.on("console", lambda message: tab.noise.append(message.text))
        tab.on("pageerror", lambda error: tab.noise.append(str(error)))
        tab.on("requestfailed", lambda request: tab.noise.append(request.url))
        tab.goto(page.as_uri())
        yield tab
        browser.close()
