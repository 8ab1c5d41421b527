"""Building an image without Docker: a Debian base with apt's packages (or none), a layer of pip's, a layer of the app's files.

Each layer is made anew only when what goes into it has changed, and the same input gives the same digest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from atoll.images.build_base import make_base
from atoll.images.build_files import AppFile, list_files, pack_files, settled
from atoll.images.build_pip import make_pip
from atoll.images.layer import LayerBlob
from atoll.images.manifest import machine_architecture
from atoll.images.steps import StepCache, StepResult, step_key
from atoll.images.threads import in_thread
from atoll.images.tree import CREATED
from atoll.images.unpack import from_os_error
from atoll.model.errors import ImageError, Invalid, Unsupported
from atoll.model.ports.images import ImageConfig
from atoll.model.spec import Build
from atoll.model.units import format_count

BUILDER = 1
"""Raised when the same input gives another layer than before."""
FILES_BUILDER = 2
"""The same, for the layer of the app's files."""
SCRATCH = "scratch"
"""The base that is no base."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class BuildProgress(Struct, frozen=True):
    """`step` is `base`, `pip`, `files` or `image`; `text` is what it does now."""

    step: str
    text: str
    cached: bool = False


class Built(Struct, frozen=True):
    """An image in the layout at `layout`, ready to be pushed or added to a store."""

    layout: Path
    digest: str
    size_bytes: int
    """Of its layers as they lie in the layout (compressed)."""
    took_s: float
    cached: tuple[str, ...]
    """Steps that were not made anew."""


Progress = Callable[[BuildProgress], None]


async def build(directory: Path, spec: Build, *, cache: Path, progress: Progress | None = None, refresh: bool = False) -> Built:
    """Build the image of the app in `directory`; what is made on the way is kept in `cache` for the next time.

    `refresh` makes base and pip layers anew, with the packages that the mirrors have now. Safe to repeat and to run
    several times at once (one waits for the other). Raises Invalid for a mistake in `spec` or the files, Unsupported when
    this machine cannot build, Unavailable without a mirror, ImageError, DeadlineExceeded; nothing half-made stays.
    """
    if os.geteuid() != 0:
        raise Unsupported("building an image needs root: Debian's packages are installed as root", mend="run it with sudo")
    if ".." in Path(spec.workdir).parts:
        raise Invalid(f"build.workdir: {spec.workdir} has '..'", field="build.workdir", mend="write the path itself")
    for name, packages in (("apt", spec.apt), ("pip", spec.pip)):
        if spec.base == SCRATCH and packages:
            raise Invalid(
                f"build.{name}: packages need a system below them, and base is '{SCRATCH}'",
                field=f"build.{name}",
                mend="leave base out, or the packages",
            )
    steps = StepCache(cache)
    work = _Build(steps, spec, progress or (lambda _: None), refresh)
    started = time.monotonic()
    try:
        files = await in_thread(lambda: list_files(directory, spec))
        async with steps.locked():
            layers = []
            if spec.base != SCRATCH:
                base = await work.base()
                layers.append(base.layer)
                if spec.pip:
                    layers.append((await work.pip(base)).layer)
            layers.append((await work.files(files)).layer)
            resolved = steps.layout.put_image(layers, _config(spec), created=CREATED, comment=tuple(work.comments))
            steps.prune()
    except OSError as error:
        raise from_os_error(error, f"cannot build in {cache}") from None
    work.tell("image", resolved.digest)
    return Built(
        steps.layout.directory,
        resolved.digest,
        sum(layer.size for layer in layers),
        time.monotonic() - started,
        tuple(work.cached),
    )


class _Build:
    def __init__(self, steps: StepCache, spec: Build, progress: Progress, refresh: bool) -> None:
        self._steps = steps
        self._spec = spec
        self._progress = progress
        self._refresh = refresh
        self._architecture = machine_architecture()
        self._suite = spec.base.removeprefix("debian:")
        self.cached: list[str] = []
        self.comments: list[str] = []

    def tell(self, step: str, text: str, *, cached: bool = False) -> None:
        self._progress(BuildProgress(step, text, cached))

    async def base(self) -> StepResult:
        packages = sorted({*self._spec.apt, *(("python3",) if self._spec.pip else ())})
        key = step_key("base", BUILDER, self._suite, self._architecture, packages)
        self.comments.append(f"debian:{self._suite} {' '.join(packages)}".strip())
        if found := self._find("base", key):
            return found
        self.tell("base", f"Debian {self._suite} with {', '.join(packages) or 'nothing else'}")
        return await make_base(
            self._steps,
            key,
            suite=self._suite,
            packages=packages,
            architecture=self._architecture,
            on_line=lambda line: self.tell("base", line),
        )

    async def pip(self, base: StepResult) -> StepResult:
        python = base.facts.get("python")
        if python is None:
            raise ImageError("build.pip: the base has no python3", field="build.pip", mend="add python3 to build.apt")
        requirements = sorted(set(self._spec.pip))
        key = step_key("pip", BUILDER, self._suite, self._architecture, python, requirements)
        self.comments.append(f"pip install {' '.join(requirements)}")
        if found := self._find("pip", key):
            return found
        self.tell("pip", f"{', '.join(requirements)} for Python {python}")
        return await make_pip(
            self._steps,
            key,
            requirements=requirements,
            python=python,
            suite=self._suite,
            architecture=self._architecture,
            on_line=lambda line: self.tell("pip", line),
        )

    async def files(self, files: list[AppFile]) -> StepResult:
        spec = self._spec
        key = step_key("files", FILES_BUILDER, spec.workdir, [(file.path, file.stamp, str(file.source)) for file in files])
        self.comments.append("the app's files")
        if found := self._find("files", key, always=True):
            return found
        self.tell("files", format_count(len(files), "file"))
        with self._steps.workplace() as work:
            trusted = settled(files)
            layer = work / "layer"
            blob: LayerBlob = await in_thread(lambda: pack_files(files, spec.workdir, layer))
            return self._steps.keep(key if trusted else step_key("content", blob.digest), StepResult(blob), layer)

    def _find(self, step: str, key: str, *, always: bool = False) -> StepResult | None:
        found = self._steps.find(key) if always or not self._refresh else None
        if found is not None:
            self.cached.append(step)
            self.tell(step, "unchanged", cached=True)
        return found


def _config(spec: Build) -> ImageConfig:
    env = {**({"PATH": PATH, "LANG": "C.UTF-8"} if spec.base != SCRATCH else {}), **spec.env}
    return ImageConfig(
        command=spec.command,
        env=tuple(f"{name}={value}" for name, value in env.items()),
        workdir=spec.workdir,
        user=spec.user or "",
    )
