"""What `bench ingress` drains is the node that serves."""

from __future__ import annotations

import pytest
from bench.ingress_live import holder

from atoll.model.records import Instance, OwnerKind, Status
from atoll.model.states import Desired, Phase
from atoll.model.views import InstanceView


def view(id: str, node: str | None, desired: Desired = Desired.RUN, *, ready: bool = True) -> InstanceView:
    instance = Instance(id=id, project="p", owner_kind=OwnerKind.APP, owner="web", created_at=1.0, node=node, desired=desired)
    status = Status(instance=id, project="p", node=node or "", phase=Phase.RUNNING, ready=ready) if node is not None else None
    return InstanceView(instance=instance, status=status, revision=1)


def test_the_node_that_is_drained_is_the_one_that_serves() -> None:
    gone = [view("a", "second", Desired.STOP), view("b", "second", Desired.DRAIN), view("c", "second", ready=False)]
    assert holder([*gone, view("d", "first")]) == ("first", ["d"])
    assert holder([view("d", "first"), view("e", "second"), view("f", "second")]) == ("second", ["e", "f"])


def test_a_drain_with_nothing_to_move_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="none to be drained"):
        holder([view("a", "second", Desired.DRAIN), view("b", None)])
