"""Files that a worker's process serves as they are: what workerd's own server of them is told (`AssetsService`). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atoll.model.worker import Assets, Worker

RULES = {"_headers": "headers", "_redirects": "redirects"}
"""Files that say how the others are served, and what workerd calls their text."""
RULES_BYTES_MAX = 128 << 10


def assets_directory(assets: Assets) -> str:
    """Return where they are, below the worker's modules."""
    return assets.directory.removeprefix("./").rstrip("/")


def is_asset(worker: Worker, path: str) -> bool:
    """Return whether a file of the worker's is served, and so is no module."""
    return worker.assets is not None and path.startswith(assets_directory(worker.assets) + "/")


def assets_config(assets: Assets, files: Mapping[str, str]) -> str:
    """Return workerd's settings, in JSON; `files` has the text of those of `RULES` that are there."""
    settings: dict[str, Any] = {"html_handling": assets.html.value, "not_found_handling": assets.not_found.value}
    if assets.worker_first:
        settings["run_worker_first"] = list(assets.worker_first)
    return json.dumps(settings | {RULES[name]: text for name, text in files.items()})
