"""The numbers of failure detection, and how they hang together.

A pause of 3 s must be survived at a loss of 20 % and a jitter of 0.5 s, and 5 s from death to replacement must not be exceeded:

    last beat before the pause     0.1 to 0.5 s before it (agents beat the faster the more of their beats are lost)
    the pause                      3.0 s; nothing is sent, nothing answered
    first sign after it            0.05 to 0.5 s: a burst of beats, and answers to all probes that waited in its socket
                                   ──────
    silent_s                       4.2 s, and then at most 0.4 s until the replacement is written
"""

from __future__ import annotations

from msgspec import Struct

TICK_S = 0.1
"""How often a server looks who is silent."""
HELPERS = 3
"""Agents through which a silent node is asked in each round, beside straight."""
PROBED_PER_TICK_MAX = 100
"""Nodes asked in one tick; when more are silent, they take turns. 8 datagrams each, so 8,000 a second."""
AWAY_S = 60.0
"""The silence that an agent may announce when it ends in order."""


class Rules(Struct, frozen=True, kw_only=True):
    suspect_s: float = 1.2
    """Silence after which a node is asked."""
    probe_every_s: float = 0.4
    probe_silent_every_s: float = 5.0
    """The same of a node that is believed to be silent: it may be reached by others before it is heard by us."""
    silent_s: float = 4.2
    """Silence after which it is believed."""
    rounds_min: int = 4
    """Rounds of probes that must have gone unanswered: a server that has just begun to lead asks, too, before it believes."""
    denials_wait_s: float = 0.4
    """So much longer one waits for a helper to say that it has asked in vain; that shows that our own words get out."""
    others_s: float = 1.5
    """Somebody must have been heard within so long, or it is us."""
