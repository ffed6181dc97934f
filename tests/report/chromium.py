"""The browser that pages are tried in."""

from __future__ import annotations

import importlib.util
import os
import shutil


def chromium_path() -> str | None:
    """A Chromium or Chrome of this machine, where there is also playwright to drive it; CHROMIUM names another one."""
    if importlib.util.find_spec("playwright") is None:
        return None
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)
