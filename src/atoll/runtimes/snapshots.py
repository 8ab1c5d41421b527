"""Snapshots as directories: how one is written so that it is whole or nothing, and read so that only what fits here is restored.

DIRECTORY/manifest.json   written last; without it the directory is no snapshot
          …               the runtime's own files, of which only written blocks take room
Blocking: call it from threads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from atoll.model.codec import decode, encode
from atoll.model.errors import AtollError, Conflict, Corrupt, Exhausted, Invalid, NotFound, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Box, Compatibility, Limits, Snapshot, SnapshotFile
from atoll.model.spec import SNAPSHOT_RUNTIMES, RuntimeName
from atoll.runtimes.loop_disk import extents
from atoll.runtimes.mounts import descriptor, open_beneath

MANIFEST = "manifest.json"
SNAPSHOT_DISK = "disk"
"""The instance's own disk in a snapshot."""
MANIFEST_BYTES_MAX = 64 << 10
EMULATED = "emulated"
_CHUNK_BYTES = 64 << 10
_CRIU_S_MAX = 10.0
_CPUINFO = Path("/proc/cpuinfo")


def refuse(name: RuntimeName, why: str = "") -> Unsupported:
    """Return the refusal of a runtime that takes no snapshots."""
    others = ", ".join(SNAPSHOT_RUNTIMES)
    return Unsupported(f"{name} takes no snapshots{f': {why}' if why else ''}", mend=f"use one of: {others}", field="runtime")


@functools.cache
def why_no_checkpoints() -> str:
    """Return why containers of this node's kernel are not checkpointed: what CRIU says, which is asked once."""
    if shutil.which("criu") is None:
        return "CRIU is not installed, and is not used where it is"
    try:
        found = subprocess.run(["criu", "check"], capture_output=True, text=True, timeout=_CRIU_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"CRIU cannot be run: {error}"
    if found.returncode != 0:
        return f"CRIU does not work here: {(found.stderr or found.stdout).strip()[-200:]}"
    return "CRIU works here, but is not used by this version"


def begin(directory: Path) -> None:
    """Make the empty directory that a snapshot is written into. Raises Conflict where there is something already."""
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise Conflict(f"there is something at {directory} already", mend="take the snapshot into a directory of its own") from None


def seal(
    directory: Path,
    names: Sequence[str],
    *,
    compatibility: Compatibility,
    image: str,
    limits: Limits,
    networked: bool,
) -> Snapshot:
    """Write the manifest of what is in `directory`, after which it is a snapshot, and return it."""
    found = [(name, (directory / name).stat()) for name in sorted(names)]
    snapshot = Snapshot(
        digest=digest_of(directory, [name for name, _ in found]),
        compatibility=compatibility,
        image=image,
        limits=limits,
        networked=networked,
        files=tuple(SnapshotFile(name, state.st_size) for name, state in found),
        stored_bytes=sum(state.st_blocks * 512 for _, state in found),
        taken_at=time.time(),
    )
    partial = directory / f"{MANIFEST}.next"
    with partial.open("wb") as file:
        file.write(encode(snapshot))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / MANIFEST)
    return snapshot


def abandon(directory: Path) -> None:
    """Remove what was written of a snapshot that did not come about."""
    shutil.rmtree(directory, ignore_errors=True)


def failure(error: OSError) -> AtollError:
    """Return what the failure to write a snapshot is for its user."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return Exhausted("the node's disk is full", mend="remove snapshots, or free space on the node")
    return RuntimeFailed(f"the snapshot cannot be written: {error}")


def load(directory: Path) -> Snapshot:
    """Return the manifest of the snapshot in `directory`, whose files have the sizes that it says.

    Raises NotFound (no snapshot, or one that was not finished), Corrupt.
    """
    try:
        with (directory / MANIFEST).open("rb") as file:
            snapshot = decode(file.read(MANIFEST_BYTES_MAX), Snapshot)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no whole snapshot in {directory}", mend="take it again") from None
    except (OSError, Invalid) as error:
        raise Corrupt(f"the snapshot's manifest cannot be read: {error}", mend="take the snapshot again") from None
    for file_ in snapshot.files:
        path = directory / file_.name
        if "/" in file_.name or not path.is_file() or path.is_symlink():
            raise Corrupt(f"{file_.name!r} of the snapshot is missing", mend="take the snapshot again")
        if path.stat().st_size != file_.size_bytes:
            raise Corrupt(
                f"{file_.name!r} of the snapshot has {path.stat().st_size} bytes instead of {file_.size_bytes}: it was cut off",
                mend="take the snapshot again",
            )
    return snapshot


def check_content(directory: Path, snapshot: Snapshot) -> None:
    """Raises Corrupt where the files do not hold what they held when it was taken. Reads all of them."""
    if digest_of(directory, [file.name for file in snapshot.files]) != snapshot.digest:
        raise Corrupt(f"the snapshot {snapshot.digest[:19]} does not hold what it held", mend="take the snapshot again")


def check_fit(snapshot: Snapshot, here: Compatibility, box: Box) -> None:
    """Raises Unsupported for a snapshot of another surrounding than `here`, Invalid for a box that it cannot be put into."""
    there = snapshot.compatibility
    if there.runtime != here.runtime:
        raise Unsupported(
            f"this is a snapshot of {there.runtime}, and not of {here.runtime}", mend=f"restore it with {there.runtime}"
        )
    for what, theirs, ours in (
        (f"version of {here.runtime}", there.version, here.version),
        ("processor", there.cpu, here.cpu),
        ("kernel", there.kernel, here.kernel),
    ):
        if theirs != ours:
            raise Unsupported(
                f"the snapshot was taken with another {what}: {theirs}, here it is {ours}",
                mend="restore it on a node like the one that it was taken on, or take it again",
            )
    if box.image.digest != snapshot.image:
        raise Invalid("the snapshot was made from another image", mend="give the image that it was made from", field="image")
    if box.limits != snapshot.limits:
        raise Invalid("a copy has the limits of its snapshot", mend="give the same resources", field="resources")
    if (box.netns is not None) != snapshot.networked:
        had = "a network" if snapshot.networked else "no network"
        raise Invalid(f"the snapshot is of an instance with {had}, and the copy differs in it", field="network")


def machine_id(instance: str, entropy: bytes) -> str:
    """Return a new machine id (machine-id(5)), which tells nothing of the entropy that it is made with."""
    return hashlib.sha256(b"atoll-machine-id" + instance.encode() + entropy).hexdigest()[:32]


def give_machine_id(root: Path, instance: str) -> None:
    """Give an instance whose root is reached from the node a machine id of its own, where it has one at all."""
    with descriptor(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        with contextlib.suppress(OSError):
            with descriptor(open_beneath(fd, "etc/machine-id", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)) as file:
                if stat.S_ISREG(os.fstat(file).st_mode):
                    os.ftruncate(file, 0)
                    os.write(file, f"{machine_id(instance, os.urandom(32))}\n".encode())


@functools.cache
def processor() -> str:
    """Return the node's processor in a word: its model, and a digest of what it can do."""
    text = _CPUINFO.read_text().partition("\n\n")[0]
    fields = dict(re.findall(r"^([^\t\n]+)\t*: ?(.*)$", text, re.MULTILINE))
    name = fields.get("model name", "unknown")
    abilities = hashlib.sha256(" ".join(sorted(fields.get("flags", "").split())).encode()).hexdigest()[:12]
    parts = (fields.get("cpu family", ""), fields.get("model", ""), fields.get("stepping", ""))
    return f"{name} ({'/'.join(parts)}, {abilities})"


def digest_of(directory: Path, names: Sequence[str]) -> str:
    """Return the digest of what files hold: holes are zeros, and no zeros count."""
    total = hashlib.sha256()
    for name in names:
        with descriptor(os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as fd:
            size = os.fstat(fd).st_size
            total.update(f"{len(name)} {name} {size}\n".encode())
            done = 0
            for start, end in extents(fd, size):
                for at in range(max(done, start - start % _CHUNK_BYTES), end, _CHUNK_BYTES):
                    data = os.pread(fd, _CHUNK_BYTES, at)
                    done = at + _CHUNK_BYTES
                    if data.count(0) != len(data):
                        total.update(at.to_bytes(8, "little"))
                        total.update(data)
    return f"sha256:{total.hexdigest()}"
