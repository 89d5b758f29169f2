"""Drives Debian's Chromium: for tests marked `pages`."""

import contextlib
from collections.abc import Iterator
from typing import Any

WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 400, "height": 800}


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; `.new_page(viewport=WIDE)` opens a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        found = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


def axe(page: Any) -> list[str]:
    """The accessibility rules (axe-core's) that an open page breaks, each with where."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]
