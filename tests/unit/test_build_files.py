"""Which files of an app's directory go into its image."""

from __future__ import annotations

from pathlib import Path

from atoll.cli.spec_file import NAMES
from atoll.images.build_files import list_files
from atoll.model.spec import Build


def test_the_spec_itself_is_not_in_the_image_so_that_changing_it_alone_makes_no_other(tmp_path: Path) -> None:
    for name in (*NAMES, "atoll.gpu.toml", "atoll.py", "app.toml", "sub/app.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    listed = [file.path for file in list_files(tmp_path, Build())]
    assert listed == ["app.toml", "atoll.py", "sub", "sub/app.py"]


def test_who_says_what_is_ignored_says_all_of_it(tmp_path: Path) -> None:
    for name in ("atoll.toml", "app.log"):
        (tmp_path / name).write_text(name)
    assert [file.path for file in list_files(tmp_path, Build(ignore=("*.log",)))] == ["atoll.toml"]
