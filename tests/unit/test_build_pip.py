"""Nothing of pip's packages runs during a build: what is no wheel is refused, whoever names it."""

from __future__ import annotations

import asyncio
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from atoll.images.build_pip import check_wheel, make_pip
from atoll.images.steps import StepCache, StepResult
from atoll.model.errors import Invalid

OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


def source(directory: Path) -> Path:
    """Make a package as source that leaves a file `ran` when anything of it runs."""
    package = directory / "reef-1.0"
    package.mkdir()
    (package / "setup.py").write_text(
        f"open({str(directory / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='reef', version='1.0')\n"
    )
    with tarfile.open(directory / "reef-1.0.tar.gz", "w:gz") as archive:
        archive.add(package, "reef-1.0")
    return package


def wheel(directory: Path, *requires: str) -> Path:
    path = directory / "bay-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: bay\nVersion: 1.0\n" + "".join(f"Requires-Dist: {one}\n" for one in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bay.py", "")
        archive.writestr("bay-1.0.dist-info/METADATA", metadata)
        archive.writestr("bay-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("bay-1.0.dist-info/RECORD", "bay.py,,\n")
    return path


def make(directory: Path, requirement: str) -> StepResult:
    async def main() -> StepResult:
        cache = StepCache(directory / "cache")
        async with cache.locked():
            return await make_pip(
                cache,
                "key",
                requirements=[requirement],
                python=OWN,
                suite="bookworm",
                architecture="amd64",
                on_line=lambda _: None,
            )

    return asyncio.run(main())


@pytest.mark.parametrize(
    "requirement",
    [
        "git+https://example.org/reef",
        "reef @ git+https://example.org/reef@v1.whl",
        "reef[x] @ https://example.org/reef-1.0.tar.gz",
        "https://example.org/reef-1.0.zip",
        "reef @ file:///srv/reef",
        "reef/sub",
        "https://example.org/reef.whl/reef.tar.gz ; python_version > '3'",
    ],
)
def test_a_requirement_that_is_no_wheel_is_refused_before_anything_is_fetched(requirement: str) -> None:
    with pytest.raises(Invalid, match="is no wheel") as refused:
        check_wheel(requirement)
    assert refused.value.field == "build.pip"
    assert "pip wheel" in str(refused.value.mend)


@pytest.mark.parametrize(
    "requirement",
    [
        "flask",
        "flask[async,dotenv]>=3,<4",
        "torch==2.1+cu118",
        "flask (>=3) ; platform_machine == 'x86_64' and os_name != '/'",
        "bay @ https://example.org/bay-1.0-py3-none-any.whl#sha256=00",
        "https://example.org/bay-1.0-py3-none-any.whl?token=1",
    ],
)
def test_names_and_wheels_are_taken(requirement: str) -> None:
    check_wheel(requirement)


def test_a_package_that_comes_as_source_is_refused_for_this_machine_s_own_python_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    with pytest.raises(Invalid, match="'reef") as refused:
        make(tmp_path, "reef")
    assert "wheel" in str(refused.value.mend)
    assert not (tmp_path / "ran").exists()


def test_what_a_wheel_requires_as_source_does_not_run_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    with pytest.raises(Invalid, match="only wheels"):
        make(tmp_path, f"bay @ file://{wheel(tmp_path, f'reef @ file://{source(tmp_path)}')}")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bay-1.0-py3-none-any.whl").unlink()
    assert make(tmp_path, f"bay @ file://{wheel(tmp_path)}").layer.size > 0
