"""Signal names as users write them, and what a wait status means."""

from __future__ import annotations

import signal

from atoll.model.signals import signal_number as signal_number


def signal_name(number: int) -> str:
    """Return the name of a signal: `signal_name(15) == "SIGTERM"`."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
