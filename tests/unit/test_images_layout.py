"""The layout that builds are kept in."""

from __future__ import annotations

import os
import time
from pathlib import Path

from atoll.images.layout import Layout


def test_a_blob_that_is_put_again_counts_as_new_so_that_tidying_up_spares_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.create()
    digest = layout.put(b"a manifest")
    long_ago = time.time() - 7_200
    os.utime(layout.blob(digest), (long_ago, long_ago))
    assert layout.put(b"a manifest") == digest
    assert time.time() - layout.blob(digest).stat().st_mtime < 60
    assert layout.blob(digest).read_bytes() == b"a manifest"
