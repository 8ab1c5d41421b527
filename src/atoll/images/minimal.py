"""The smallest image that runs: one layer with one program, as an archive that every tool can load. For tests and benchmarks."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

FOLDERS = ("etc", "proc", "sys", "dev", "tmp", "bin", "probe", "www")


def docker_archive(path: Path, name: str, *, program: Path, target: str, command: Sequence[str] = ()) -> Path:
    """Write a `docker save` archive named `name` (REPOSITORY:TAG) to `path`, in which `program` is executable at `target`."""
    content = program.read_bytes()
    layer = _tar([(folder, None) for folder in FOLDERS] + [(target.lstrip("/"), content)])
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": [target], "Cmd": list(command), "WorkingDir": "/", "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    written = json.dumps(config).encode()
    config_name = f"{hashlib.sha256(written).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    path.write_bytes(_tar([(config_name, written), ("layer.tar", layer), ("manifest.json", manifest)]))
    return path


def _tar(members: Sequence[tuple[str, bytes | None]]) -> bytes:
    """Return a tar of files, and of folders where the content is None."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755
            if content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()
