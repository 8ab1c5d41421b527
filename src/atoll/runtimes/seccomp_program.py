"""The seccomp profile as the kernel takes it: a program of classic BPF, made by libseccomp once per agent.

Where a runtime's tool compiles the profile at every start, that is much of the start: 30 of 40 ms in LXC, 8 ms in runc for each
architecture. And LXC leaves its profile out, without a word, where the agent itself is under a filter.

As in runc, calls with higher numbers than the profile knows are not there (ENOSYS): a C library newer than the node's libseccomp
then does without them, where EPERM would be the end of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from typing import Any

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.seccomp import profile

LIBRARY = "libseccomp.so.2"
INSTRUCTION_BYTES = 8
PROGRAM_BYTES_MAX = 4096 * INSTRUCTION_BYTES
"""The kernel takes no more (BPF_MAXINSNS)."""

_OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_LOG": 0x7FFC0000,
}
_UNKNOWN_CALL = -1
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_MORE, _JUMP_IF_NOT_LESS, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
"""Where the kernel has them (`struct seccomp_data`)."""
_X32_BIT = 0x40000000
_EPERM = 1
_ENOSYS = 38
_EEXIST = 17


class _Comparison(ctypes.Structure):
    _fields_ = (("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("first", ctypes.c_uint64), ("second", ctypes.c_uint64))


@functools.cache
def filter_program(capabilities: frozenset[str]) -> bytes:
    """Return the filter for a process with `capabilities` on this machine. Raises Unsupported, RuntimeFailed. Blocking."""
    return compile_profile(profile(capabilities))


def compile_profile(source: dict[str, Any]) -> bytes:
    """Return the program for `linux.seccomp` of an OCI configuration; calls that this machine does not know are left out.

    Raises Unsupported where libseccomp is not installed, RuntimeFailed where it refuses a rule.
    """
    library = _library()
    otherwise = _action(source["defaultAction"], source.get("defaultErrnoRet"))
    context = library.seccomp_init(otherwise)
    if not context:
        raise RuntimeFailed("libseccomp cannot make a filter")
    context = ctypes.c_void_p(context)
    try:
        unknown = b""
        for name in source["architectures"]:
            token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
            if otherwise != _ACTIONS["SCMP_ACT_ALLOW"]:
                unknown += _unknown_calls(library, token, source)
            _check(library.seccomp_arch_add(context, token), name, _EEXIST)
        for rule in source["syscalls"]:
            action = _action(rule["action"], rule.get("errnoRet"))
            if action != otherwise:
                _add(library, context, action, rule)
        return unknown + _exported(library, context)
    finally:
        library.seccomp_release(context)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise Unsupported(f"{LIBRARY} is not installed", mend="apt-get install libseccomp2") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_syscall_resolve_name_arch.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    library.seccomp_rule_add_array.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    return library


def _unknown_calls(library: ctypes.CDLL, architecture: int, source: dict[str, Any]) -> bytes:
    """Return instructions that refuse an architecture's calls above those that the profile names; all others go on to what follows.

    Those of x32 do too, which have that bit in their number: what follows kills for them.
    """
    names = (name.encode() for rule in source["syscalls"] for name in rule["names"])
    most = max(library.seccomp_syscall_resolve_name_arch(architecture, name) for name in names)
    steps = (
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, 4, architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_NOT_LESS, 2, 0, _X32_BIT),
        (_JUMP_IF_MORE, 0, 1, most),
        (_RETURN, 0, 0, _action("SCMP_ACT_ERRNO", _ENOSYS)),
    )
    return b"".join(struct.pack("=HBBI", *step) for step in steps) if most > 0 else b""


def _action(name: str, errno: int | None) -> int:
    return _ACTIONS[name] | ((errno or _EPERM) if name == "SCMP_ACT_ERRNO" else 0)


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, action: int, rule: dict[str, Any]) -> None:
    given = rule.get("args") or ()
    comparisons = (_Comparison * max(1, len(given)))()
    for at, each in enumerate(given):
        comparisons[at] = _Comparison(each["index"], _OPERATORS[each["op"]], each["value"], each.get("valueTwo", 0))
    for name in rule["names"]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != _UNKNOWN_CALL:
            _check(library.seccomp_rule_add_array(context, action, number, len(given), comparisons), name)


def _exported(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    with descriptor(os.memfd_create("seccomp", os.MFD_CLOEXEC)) as fd:
        _check(library.seccomp_export_bpf(context, fd), "export")
        return os.pread(fd, PROGRAM_BYTES_MAX, 0)


def _check(result: int, what: str, *allowed: int) -> None:
    if result < 0 and -result not in allowed:
        raise RuntimeFailed(f"libseccomp refuses {what}: {os.strerror(-result)}")
