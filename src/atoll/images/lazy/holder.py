"""Keeps a mount alive: makes it, holds the kernel's descriptor, and starts the process that serves it whenever there is none.

    python -I -S holder.py LOCK MOUNT LOG COMMAND…              make the mount
    python -I -S holder.py --adopt FUSE LOCK_FD LOG COMMAND…    take over both descriptors

It prints a line when the mount is there. It is small and does nothing else, so that little can end it; nothing of the package is
imported for that. While it lives a reader waits for the next process, which is given again what the last one did not answer.
It ends when the mount is gone, or when the process fails `FAILURES_MAX` times in a row: readers then get errors.
"""

import ctypes
import fcntl
import os
import subprocess
import sys
import time

FAILURES_MAX = 8
"""Ends within `LASTED_S` of the start, in a row."""
LASTED_S = 10.0
WAIT_S, WAIT_MAX_S = 0.02, 5.0
LOG_BYTES_MAX = 4 << 20
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
EXIT_TAKEN = 3


def main(arguments: list[str]) -> int:
    if arguments[0] == "--adopt":
        fuse, lock = int(arguments[1]), int(arguments[2])
        return keep(fuse, lock, arguments[3], arguments[4:])
    lock = os.open(arguments[0], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXIT_TAKEN
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    data = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={1 << 20}"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(MS_RDONLY | MS_NOSUID | MS_NODEV)
    if libc.mount(b"atoll", os.fsencode(arguments[1]), b"fuse.atoll", flags, data.encode()) != 0:
        number = ctypes.get_errno()
        print(f"cannot mount at {arguments[1]}: {os.strerror(number)}", flush=True)
        return 1
    print("mounted", flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return keep(fuse, lock, arguments[2], arguments[3:])


def keep(fuse: int, lock: int, log: str, command: list[str]) -> int:
    """Run the command until it says that the mount is gone. Its last arguments are both descriptors and this process's id."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-900")
    except OSError:
        pass  # without the right to, it is as likely as others to be chosen when memory is short
    failures, wait_s = 0, WAIT_S
    while failures < FAILURES_MAX:
        began = time.monotonic()
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if _size(log) > LOG_BYTES_MAX else os.O_APPEND)
        output = os.open(log, flags, 0o600)
        words = [*command, str(fuse), str(lock), str(os.getpid())]
        child = subprocess.Popen(words, pass_fds=(fuse, lock), stdin=0, stdout=output, stderr=output)
        os.close(output)
        if child.wait() == 0:
            return 0
        if time.monotonic() - began > LASTED_S:
            failures, wait_s = 0, WAIT_S
        failures += 1
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, WAIT_MAX_S)
    return 1


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (little is imported here)
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
