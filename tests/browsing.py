"""The machine's Chromium, for tests: without what it would do on a network by itself."""

from __future__ import annotations

import shutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browser_path() -> str | None:
    """Path of the first that is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)
