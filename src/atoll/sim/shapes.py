"""Runs with much of one kind of fault, in which what a run of everything would seldom show is soon seen."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.sim.faults import Profile


def rivalry(profile: Profile) -> Profile:
    """Make a run of nothing but hanging stores and servers that stand for leader."""
    kinds = ("stall", "rival")
    return replace(profile, calm=False, span_s=60.0, chaos=kinds, chaos_every_s=2.5, latency_s=0.01, apps=3, nodes=2, servers=1)


def gpus_fail(profile: Profile) -> Profile:
    """Make a run of GPUs that vanish, break and fall silent."""
    chaos = ("gpu-vanish", "gpu-xid", "gpu-silent", "agent-crash", "machine-restart")
    return replace(profile, calm=False, gpus=True, chaos=chaos, chaos_every_s=4.0, latency_s=0.01, core_only=False)


def members_fall(profile: Profile) -> Profile:
    """Make a run of members of the store that are killed, stopped and cut off."""
    chaos = ("member-crash", "member-pause", "member-cut")
    return replace(profile, calm=False, members=3, chaos=chaos, chaos_every_s=2.0, latency_s=0.01)


def servers_lag(profile: Profile) -> Profile:
    """Make a run of several servers that hear late of what the others write."""
    return replace(
        profile, calm=False, servers=3, slow_watch=0.5, chaos=("stop-instance", "stop-instance", "server-crash"), chaos_every_s=0.7
    )


def leaders_change(profile: Profile) -> Profile:
    """Make a run of servers that stand still, crash and lag."""
    chaos = ("server-pause", "server-crash", "stall", "rival")
    return replace(profile, calm=False, servers=3, slow_watch=0.5, chaos=chaos, chaos_every_s=3.0, latency_s=0.01, nodes=2, apps=3)


def nodes_cut_off(profile: Profile) -> Profile:
    """Make a run of nodes that lose the servers for long."""
    chaos = ("partition", "one-way")
    calmer = replace(profile, calm=False, latency_s=0.01, lost=0.0, beats=True, once=1.0)
    return replace(calmer, span_s=150.0, chaos=chaos, chaos_every_s=15.0)


def releases_share(profile: Profile) -> Profile:
    """Make a run without faults of nothing but apps that go by shares of the requests."""
    calm = replace(profile, calm=True, lost=0.0, lost_reply=0.0, repeated=0.0, store_fails=0.0, slow_watch=0.0, runtime_fails=0.0)
    calm = replace(calm, chaos=(), skew_s=0.0, latency_s=0.003, once=0.0, core_only=False, span_s=60.0)
    return replace(calm, shares=1.0, apps=3, jobs=0)


def words_late(profile: Profile) -> Profile:
    """Make a run of requests that arrive again, late."""
    return replace(profile, calm=False, repeated=0.5, latency_s=0.01, span_s=60.0)


def agents_die(profile: Profile) -> Profile:
    """Make a run of agents that are killed."""
    return replace(profile, calm=False, chaos=("agent-crash", "stop-instance"), chaos_every_s=1.5, latency_s=0.05)
