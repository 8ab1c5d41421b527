"""SPECIFICATION.md names only tests and benchmarks that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:unit|property|contract|system|sim|chaos)/test_\w+\.py)(?:::(\w+))?`")


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(TEXT)
    assert len(named) > 100
    missing = []
    for file, name in named:
        path = ROOT / "tests" / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text or (name and re.search(rf"^\s*(?:async )?def {name}\(|^{name} = |^class {name}\b", text, re.MULTILINE) is None):
            missing.append(f"{file}::{name}")
    assert not missing


def test_nothing_that_looks_like_a_test_is_named_otherwise() -> None:
    assert set(re.findall(r"\btest_\w+\.py::\w+", TEXT)) == {
        f"{file.partition('/')[2]}::{name}" for file, name in NAMED.findall(TEXT) if name
    }


def test_every_benchmark_that_is_named_exists() -> None:
    named = set(re.findall(r"`bench (\w+)`", TEXT))
    listed = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert named
    assert named <= {line.split()[0] for line in listed.stdout.splitlines()}


def test_what_is_called_held_names_what_holds_it() -> None:
    rows = [row for row in TEXT.splitlines() if row.startswith("| ") and not row.startswith("|--")]
    held = [row for row in rows if row.rstrip(" |").rpartition("| ")[2].strip() == "held"]
    assert len(held) > 60
    assert [row for row in held if NAMED.search(row) is None] == []


def test_every_link_between_the_pages_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "SPECIFICATION.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(pages) > 15
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken


def test_every_event_code_that_is_documented_is_in_the_code() -> None:
    page = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    codes = re.findall(r"`([a-z]+(?:-[a-z]+)*)`", page.partition("## Event codes")[2].partition("\n## ")[0])
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "atoll").rglob("*.py"))
    assert len(codes) > 25
    # A node's codes are made of its health.
    assert [code for code in codes if f'"{code.removeprefix("node-")}"' not in source] == []
