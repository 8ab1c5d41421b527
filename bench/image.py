"""The image whose start is measured: one layer with one static program, as an archive that every tool can load."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

STAMP = Path(__file__).with_name("stamp.c")


def compile_stamp(directory: Path) -> Path:
    """Compile the measured process and return its path."""
    program = directory / "stamp"
    subprocess.run(["gcc", "-O2", "-static", "-o", str(program), str(STAMP)], check=True)
    return program


def docker_archive(directory: Path, name: str) -> Path:
    """Write a `docker save` archive with the program as `/stamp`, named `name` (REPOSITORY:TAG)."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("probe", "etc", "proc", "sys", "dev", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        content = compile_stamp(directory).read_bytes()
        entry = tarfile.TarInfo("stamp")
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/stamp"], "Cmd": ["/probe/t"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    path = directory / "stamp.tar"
    with tarfile.open(path, mode="w") as tar:
        for member, data in ((config_name, config), ("layer.tar", layer.getvalue()), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path
