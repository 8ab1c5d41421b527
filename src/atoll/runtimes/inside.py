"""The process that the shim becomes inside an instance, as it is told to it: `native/inside.c` reads this file."""

from __future__ import annotations

from typing import Any

CAPABILITY_BITS = {
    "CAP_AUDIT_WRITE": 29,
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_MKNOD": 27,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_RAW": 13,
    "CAP_SETFCAP": 31,
    "CAP_SETGID": 6,
    "CAP_SETPCAP": 8,
    "CAP_SETUID": 7,
    "CAP_SYS_CHROOT": 18,
}
"""The kernel's numbers (`linux/capability.h`) of those that an instance can have."""


def process_file(process: dict[str, Any], program: bytes, *, make_directory: bool) -> bytes:
    """Return the file for the `process` of an OCI configuration under the system call filter `program`.

    It holds the environment, secrets included. With `make_directory`, a working directory that is not there is made.
    """
    who = process["user"]
    mask = sum(1 << CAPABILITY_BITS[name] for name in process["capabilities"].get("bounding", ()))
    files = next(limit for limit in process["rlimits"] if limit["type"] == "RLIMIT_NOFILE")
    size = process.get("consoleSize", {"height": 0, "width": 0})
    words = [
        str(who["uid"]),
        str(who["gid"]),
        ",".join(str(group) for group in who.get("additionalGids", ())),
        f"{mask:x}",
        str(files["soft"]),
        str(files["hard"]),
        str(size["height"]),
        str(size["width"]),
        "1" if make_directory else "0",
        process["cwd"],
        str(len(process["args"])),
        *process["args"],
        str(len(process["env"])),
        *process["env"],
    ]
    return f"{len(program)}\0".encode() + program + b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)
