"""What the NVIDIA driver's error numbers (XID) mean for a device: whose mistake it was, and what would mend it.

Meanings and recommended actions follow NVIDIA's public XID catalogue (docs.nvidia.com/deploy/xid-errors, for Ampere and newer).
Where the catalogue leaves it open, the rule is: what a program can bring about by itself is its own fault, what only a reset mends
is the device's.
"""

from __future__ import annotations

from msgspec import Struct

from atoll.model.ports.devices import Trouble


class XidMeaning(Struct, frozen=True):
    """`trouble` is FAULT, BROKEN or SUSPECT; `words` say what happened, `mend` what would help."""

    trouble: Trouble
    words: str
    mend: str


_APP = "look at the program's own logs; the device needs nothing"
_RESET = "reset the GPU when nothing uses it (`nvidia-smi --gpu-reset`), or restart the node"
_WATCH = "watch it; reset the GPU at the next chance if it comes again"
_SUPPORT = "restart the node; if it comes again, have the GPU checked or replaced"

_FAULTS: dict[int, str] = {
    8: "a channel stopped working and was ended",
    11: "invalid or corrupted commands from a program",
    13: "the graphics engine refused a program's work (an access out of range, as a rule)",
    25: "illegal commands from a program",
    31: "a program touched device memory that it does not have",
    32: "invalid or corrupted commands from a program",
    43: "a program's channel was reset after its own error",
    45: "a program's channels were cleaned up after its end or an earlier error",
    60: "the video processor refused a program's work",
    68: "the video decoder refused a program's work",
    69: "the graphics engine refused a command of a program",
    80: "corrupted commands arrived from a program",
    86: "the optical flow engine refused a program's work",
    109: "a program's work did not let itself be switched out in time",
    139: "the optical flow engine refused a program's work",
}
_FAULTS |= dict.fromkeys((39, 40, 41, 70, 71, 72, 75, 76, 77, 85, *range(126, 136)), "a copy engine refused a program's work")
_FAULTS |= dict.fromkeys((82, *range(99, 106)), "the image decoder refused a program's work")
_FAULTS |= dict.fromkeys((83, 84, 88, 89, 96, 97, 98), "the video decoder refused a program's work")

_BROKEN: dict[int, tuple[str, str]] = {
    46: ("the GPU stopped working", _RESET),
    48: ("an error of device memory that could not be corrected", _RESET),
    54: ("the board lacks auxiliary power", "check its power cables"),
    62: ("the GPU's own controller halted", _RESET),
    64: ("bad memory could not be remapped", _SUPPORT),
    74: ("an NVLink failed", "reset the GPU; if it comes again, check the link's hardware"),
    79: ("the GPU has fallen off the bus", _SUPPORT),
    95: ("a memory error that could not be contained: every program on the GPU may have wrong data", _RESET),
    110: ("a security fault", _RESET),
    119: ("the GPU's system processor (GSP) does not answer", _RESET),
    120: ("the GPU's system processor (GSP) failed", _RESET),
    136: ("the NVLinks could not be brought up", _RESET),
    140: ("a memory error was not recovered from", _RESET),
    143: ("the GPU could not be initialised", _RESET),
    151: ("a key for confidential computing could not be renewed", "restart the virtual machine"),
    155: ("the NVLinks were declared failed by the driver", _RESET),
    156: ("part of the GPU was retired, which a reset puts into effect", _RESET),
    158: ("the GPU ran into a fatal timeout", _RESET),
    167: ("the PCIe link ran into a fatal timeout", _SUPPORT),
    169: ("the GPU's security processor halted", _RESET),
}

_SUSPECT: dict[int, tuple[str, str]] = {
    37: ("the driver's firmware met an error", _WATCH),
    38: ("the driver's firmware ran into a timeout", _WATCH),
    44: ("the graphics engine met a fault while it switched programs", _WATCH),
    63: ("a row of memory was set aside; the next reset remaps it", _RESET),
    66: ("the driver made an illegal access", "update the driver if it comes again"),
    67: ("the driver made an illegal access", "update the driver if it comes again"),
    92: ("many correctable memory errors", _WATCH),
    93: ("the board's small memory is written too often", "update the driver if it comes again"),
    94: ("a memory error that was contained: only the program that met it was ended", "reset the GPU when nothing uses it"),
    121: ("an error on the link between GPU and CPU, which was corrected", _WATCH),
    137: ("a remote access over NVLink was refused", _WATCH),
    141: ("the driver's fast path met an error", _WATCH),
    154: ("the driver changed its mind about how the GPU is to be recovered", "see `GPU Recovery Action` in `nvidia-smi -q`"),
    157: ("a bad part of the GPU could not be retired", _SUPPORT),
    160: ("a memory channel was retired", _WATCH),
    161: ("a memory channel could not be retired", _SUPPORT),
    168: ("the GPU has less memory than it should, because of errors in it", _SUPPORT),
    171: ("a memory error (DRAM) that could not be corrected; it comes with another code that decides", _RESET),
    172: ("a memory error (SRAM) that could not be corrected; it comes with another code that decides", _RESET),
}
_SUSPECT |= dict.fromkeys(range(144, 151), ("an error on an NVLink", _WATCH))


def classify_xid(code: int) -> XidMeaning:
    """Return what XID `code` means. One that is not known is SUSPECT: it is shown, and nothing is taken away for it."""
    if code in _FAULTS:
        return XidMeaning(Trouble.FAULT, _FAULTS[code], _APP)
    if code in _BROKEN:
        return XidMeaning(Trouble.BROKEN, *_BROKEN[code])
    if code in _SUSPECT:
        return XidMeaning(Trouble.SUSPECT, *_SUSPECT[code])
    return XidMeaning(Trouble.SUSPECT, "an error that is not known here", f"look XID {code} up in NVIDIA's catalogue")
