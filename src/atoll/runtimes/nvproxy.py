"""GPUs in gVisor: its proxy of NVIDIA's driver (`runsc --nvproxy`), which knows some versions of the driver exactly, or not at all.

gVisor's documentation, "GPU Support": the proxy's own copy of the driver's structures must match, so that with another version
runsc does not start, and says no more than that its sandbox ended. So the version is checked before anything is made.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from msgspec import structs

from atoll.model.errors import Unsupported
from atoll.model.ports.devices import Edits
from atoll.runtimes.oci_probe import once_per_boot

LIST_S_MAX = 10.0
DRIVERS_FILE = "drivers.json"
_VERSION = re.compile(r"\d{3,4}\.\d+(?:\.\d+)?")
_PROXIED = re.compile(r"/dev/nvidia(?:ctl|-uvm|\d+)")
"""The device files that the proxy stands in for; it knows no others."""
_CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES"
_ALLOWED_ANYWAY = {"compute", "utility"}
_SHOWN_MAX = 6
_OTHERS = "or use runc or crun (isolation = 'container')"


def gvisor_drivers(binary: str = "runsc", directory: Path | None = None) -> frozenset[str]:
    """Return the versions of NVIDIA's driver that this runsc can proxy; none where it is too old for it, or is not there.

    With `directory` (the runtime's own) it is asked once per run of the machine and the answer kept there. Blocking.
    """
    if directory is None:
        return frozenset(_ask(binary).split())
    return frozenset(once_per_boot(directory, binary, lambda: _ask(binary), file=DRIVERS_FILE).split())


def _ask(binary: str) -> str:
    if shutil.which(binary) is None:
        return ""
    command = [binary, "nvproxy", "list-supported-drivers"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIST_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if result.returncode != 0:  # a runsc of before 2024 has no such command
        return ""
    return " ".join(line.strip() for line in result.stdout.splitlines() if _VERSION.fullmatch(line.strip()))


def check_driver(driver: str, drivers: Collection[str]) -> None:
    """Raises Unsupported where the proxy does not know `driver`: with those of its branch that it knows, and what would help."""
    if driver in drivers:
        return
    if not drivers:
        raise Unsupported(
            "this runsc cannot hand on a GPU: it has no nvproxy, or does not list the drivers that it knows",
            mend=f"install a runsc whose `runsc nvproxy list-supported-drivers` has {driver}, {_OTHERS}",
            field="runtime",
        )
    branch = sorted((each for each in drivers if each.partition(".")[0] == driver.partition(".")[0]), key=_order)
    known = f"of branch {driver.partition('.')[0]} it knows {', '.join(branch[-_SHOWN_MAX:])}" if branch else _branches(drivers)
    raise Unsupported(
        f"gVisor cannot hand on a GPU of this node: its nvproxy does not know the driver {driver}; {known}",
        mend=f"install one of those drivers, or a newer runsc, {_OTHERS}",
        field="runtime",
    )


def _branches(drivers: Collection[str]) -> str:
    branches = sorted({each.partition(".")[0] for each in drivers}, key=int)
    return f"it knows none of that branch, only of {', '.join(branches)}"


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def check_edits(edits: Edits, drivers: Collection[str], forced: str = "") -> None:
    """Raises Unsupported where gVisor cannot carry out `edits`. `forced` is the version that an operator chose to speak."""
    if not edits:
        return
    if not edits.gvisor_driver:
        raise Unsupported(
            "gVisor hands on devices of NVIDIA, whole or in time-slices: no partitions (MIG), no MPS, nothing of other vendors",
            mend="use runc or crun (isolation = 'container')",
            field="runtime",
        )
    check_driver(forced or edits.gvisor_driver, drivers)


def proxied(edits: Edits) -> Edits:
    """Return what of `edits` gVisor has a use for: its own /proc shows nothing of the node's devices."""
    return structs.replace(edits, nodes=tuple(node for node in edits.nodes if _PROXIED.fullmatch(node.path)), masked=())


def options(edits: Edits, forced: str = "") -> list[str]:
    """Return runsc's options for an instance with `edits`."""
    if not edits:
        return []
    words = ["--nvproxy"]
    wanted = dict(edits.env).get(_CAPABILITIES, "")
    if set(wanted.split(",")) - _ALLOWED_ANYWAY - {""}:
        words.append(f"--nvproxy-allowed-driver-capabilities={wanted}")
    if forced:
        words.append(f"--nvproxy-driver-version={forced}")
    return words
