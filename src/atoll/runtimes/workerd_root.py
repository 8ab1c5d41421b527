"""The layer above a worker's modules: workerd, the libraries that it needs, certificates, and nothing that could be run beside it.

It lies above the image, and its directories hide the image's, so that nothing in an image takes part in how workerd starts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.model.worker import MODULES, STATE
from atoll.runtimes.workerd_config import CONFIG, SERVICES

PROGRAM = "/usr/bin/workerd"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
USER = 65532
_OPAQUE = "trusted.overlay.opaque"
_HIDING = ("bin", "etc", "lib", "lib64", "run", "sbin", "usr")
_POINTS = ("dev", "proc", "sys", "tmp", MODULES[1:], STATE[1:])
_FILES = {
    "etc/passwd": f"root:x:0:0:root:/:/none\nworker:x:{USER}:{USER}:worker:/:/none\n",
    "etc/group": f"root:x:0:\nworker:x:{USER}:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "etc/hosts": "",
    "etc/hostname": "",
    "etc/resolv.conf": "",
    CONFIG: "",
}
_LDD_S_MAX = 10.0


def find_workerd(name: str) -> Path:
    """Return workerd from this virtual environment, else from PATH. Raises Unsupported."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise Unsupported("workerd is not installed", mend="install npm, then run `make setup`; or put workerd into PATH")
    return Path(found).resolve()


def make_layer(program: Path, directory: Path) -> Path:
    """Return the layer for `program` below `directory`, made where it is not there yet. One call at a time. Blocking.

    Raises Unsupported for a program whose libraries are not here, RuntimeFailed where the disk is full.
    """
    status = program.stat()
    layer = directory / f"{status.st_size:x}-{status.st_mtime_ns:x}"
    if layer.is_dir():
        return layer
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        work = Path(tempfile.mkdtemp(prefix="making-", dir=directory))
        try:
            _fill(work, program)
            work.chmod(0o755)
            work.rename(layer)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise RuntimeFailed(f"cannot make the layer of workerd: {error}", mend="free some disk space") from None
    return layer


def forget_layers(directory: Path) -> None:
    """Remove the layers of all versions; nothing may run on them. Blocking."""
    shutil.rmtree(directory, ignore_errors=True)


def _fill(work: Path, program: Path) -> None:
    for name in (*_HIDING, *_POINTS, SERVICES[1:]):
        (work / name).mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
    for source, target in ((program, PROGRAM), *((path, str(path)) for path in libraries(program))):
        _copy(source, work / target.lstrip("/"), 0o755)
    if CERTIFICATES.exists():
        _copy(CERTIFICATES, work / str(CERTIFICATES).lstrip("/"), 0o644)
    for path in work.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    for name in _HIDING:
        os.setxattr(work / name, _OPAQUE, b"y")


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)  # a link's content, under the name that the loader asks for
    target.chmod(mode)


def libraries(program: Path) -> list[Path]:
    """Return the libraries that the loader finds for `program`, and the loader. Raises Unsupported where one is missing."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=_LDD_S_MAX, check=False)
    if done.returncode != 0:
        raise Unsupported(f"{program} is no program of this machine: {done.stderr.strip()[:200]}", mend="install workerd again")
    missing = re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)
    if missing:
        raise Unsupported(f"workerd needs {', '.join(missing)}", mend="install the library, or another version of workerd")
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
