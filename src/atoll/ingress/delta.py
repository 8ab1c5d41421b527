"""One Envoy's side of the incremental aggregated discovery protocol: requests in, responses out, no I/O.

Protocol: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds. Of each kind at most one response is
unanswered, so that a refusal always tells which response is meant. A response of several resources that is refused is sent
again one by one, which finds the bad one; that one is put back to what Envoy last took, and all others go on. A listener may be
refused because its port is somebody else's for a moment, so it alone is tried again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from envoy.service.discovery.v3 import discovery_pb2

from atoll.ingress.held_secrets import HeldSecrets
from atoll.ingress.hostnames import Asked, Hostnames, order
from atoll.ingress.resources import ROUTE_CONFIG, SHOWN, Kind, Name, Resource

RESPONSE_RESOURCES_MAX = 2_000
HOLD_S = 1.0
"""The longest that a hostname waits for the endpoints it leads to. Envoy asks for them within a millisecond or two."""
LISTEN_AGAIN_S = 15.0
"""After so long a listener that was refused is tried again."""
MISSED = f"{ROUTE_CONFIG}/missed.invalid"
"""What Envoy is told of hostnames that nobody has."""

Resources = Mapping[Kind, Mapping[str, Resource]]


class Verdicts:
    """What Envoy has said of resources so far; it outlives a connection, so that a new one starts with what is good."""

    def __init__(self, refused: Callable[[Resource, str], None], taken: Callable[[Resource], None] = lambda resource: None) -> None:
        """`refused` is called once for each version of a resource that Envoy does not take, with its words, and `taken` if it
        takes that after all."""
        self._refused = refused
        self._taken = taken
        self._good: dict[Name, Resource] = {}
        self._bad: dict[Name, str] = {}
        self._again: set[Name] = set()
        """What was refused and is to be tried again."""
        self.suspects: set[Name] = set()

    def choose(self, name: Name, newest: Resource | None) -> Resource | None:
        """Return what Envoy should have: the newest, or if it was refused, the last that was taken."""
        if newest is not None and self._bad.get(name) == newest.version and name not in self._again:
            return self._good.get(name)
        return newest

    def doubt(self, kind: Kind) -> list[str]:
        """Have all of `kind` that was refused tried again, each by itself; return their names."""
        names = [name for name in self._bad if name[0] is kind]
        self._again.update(names)
        self.suspects.update(names)
        return [text for _, text in names]

    def take(self, name: Name, resource: Resource | None) -> None:
        self._settle(name)
        if resource is None:
            self._good.pop(name, None)
            self._bad.pop(name, None)
        else:
            self._good[name] = resource
            if self._bad.get(name) == resource.version:
                del self._bad[name]
                self._taken(resource)

    def refuse(self, name: Name, resource: Resource, words: str) -> None:
        self._settle(name)
        if self._bad.get(name) != resource.version:
            self._bad[name] = resource.version
            self._refused(resource, words)

    def _settle(self, name: Name) -> None:
        self.suspects.discard(name)
        self._again.discard(name)


class _Channel:
    """One kind on one connection."""

    def __init__(self) -> None:
        self.wildcard = False
        self.subscribed: set[str] = set()
        self.sent: dict[str, str] = {}
        """Name → version that Envoy has, or will have once it takes what is in flight."""
        self.applied: dict[str, str] = {}
        """Name → version that Envoy has said to have."""
        self.unanswered: set[str] = set()
        """Names of secrets that a handshake waits for, be the answer that there is none."""
        self.dirty: set[str] = set()
        self.nonce = ""
        """Of the last response; there is none yet while it is empty, and Envoy waits for one even if it says nothing."""
        self.in_flight: dict[str, Resource | None] | None = None


class DeltaSession:
    """`resources` is live: call `changed` after it was changed, and `receive` for each request; then `respond` until None."""

    def __init__(
        self,
        resources: Resources,
        verdicts: Verdicts,
        withheld: Collection[Kind] = (),
        *,
        hostnames: Hostnames | None = None,
        http3_hosts: Collection[str] = (),
    ) -> None:
        """Of kinds that are `withheld`, which is live, too, nothing is said: what is known of them is not complete yet.

        `hostnames` says which of the hostnames Envoy is to have, and outlives a connection; all of them without it.
        `http3_hosts`, live as well, are those that the HTTP/3 listener has.
        """
        self._resources = resources
        self._hostnames = hostnames or Hostnames(resources[Kind.HOST], ahead_max=sys.maxsize)
        self._all = self._hostnames.all
        """Whether Envoy was told of all hostnames."""
        self._asked = Asked(self._hostnames)
        self._withheld = withheld
        self._verdicts = verdicts
        self._channels: dict[Kind, _Channel] = {}
        self._nonce = 0
        self._awaited: set[str] = set()
        """Clusters that are new to Envoy and whose endpoints it does not have yet."""
        self._held_until: float | None = None
        self._listen_again: float | None = None
        """When listeners that were refused are tried again."""
        self._shut = False
        """Whether a listener was refused since they were last tried."""
        self._secrets = HeldSecrets(http3_hosts)

    @property
    def held_until(self) -> float | None:
        """When `respond` should be called again even if nothing happens, on the clock that it was given."""
        held = self._held_until
        if held is None and self._asked.waiting and self._channels[Kind.HOST].in_flight is None:
            held = self._asked.missed_until
        return min((each for each in (held, self._listen_again) if each is not None), default=None)

    def applied(self, name: Name) -> str | None:
        """Return the version of a resource that Envoy has confirmed."""
        channel = self._channels.get(name[0])
        return channel.applied.get(name[1]) if channel else None

    def changed(self, names: Iterable[Name]) -> None:
        known = set(names)
        for name in self._hostnames.changed(name for kind, name in known if kind is Kind.HOST):
            known.add((Kind.HOST, name))
        for kind, name in known:
            if (channel := self._channels.get(kind)) is not None:
                channel.dirty.add(name)
                if kind is Kind.SECRET:
                    channel.dirty.update(self._secrets.touched(name))

    def receive(self, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        """Take over what Envoy asks for, and its answer to the last response. A kind that is not ours is ignored."""
        try:
            kind = Kind(request.type_url)
        except ValueError:
            return
        channel = self._channels.get(kind)
        first = channel is None
        if channel is None:
            channel = self._channels[kind] = _Channel()
            named = [name for name in request.resource_names_subscribe if name != "*"]
            channel.wildcard = kind is Kind.HOST or not named or len(named) < len(request.resource_names_subscribe)
            channel.wildcard = channel.wildcard and kind is not Kind.SECRET
            channel.dirty.update(self._resources[kind])
            if kind is Kind.LISTENER:
                self._verdicts.doubt(kind)
        elif request.response_nonce and request.response_nonce == channel.nonce and channel.in_flight is not None:
            self._answer(kind, channel, request)
        named = [] if kind is Kind.HOST else list(request.resource_names_subscribe)
        for name in named:
            channel.subscribed.add(name)
            channel.dirty.add(name)
            channel.sent.pop(name, None)
            if kind is Kind.SECRET and self._secrets.ask(name):
                channel.unanswered.add(name)
        for name in request.resource_names_unsubscribe:
            channel.subscribed.discard(name)
            if kind is Kind.SECRET:
                self._secrets.leave(name)
            if not channel.wildcard:
                channel.sent.pop(name, None)
                channel.applied.pop(name, None)
        if first:
            # After a reconnect Envoy says what it still has; what is no longer ours will be removed.
            channel.sent.update(request.initial_resource_versions)
            channel.applied.update(request.initial_resource_versions)
            channel.dirty.update(request.initial_resource_versions)
        if kind is Kind.HOST:
            # After a reconnect Envoy names all that it ever asked for.
            asked = [name for name in request.resource_names_subscribe if name != "*"]
            self._asked.add(asked)
            if first:
                self._hostnames.begin(request.initial_resource_versions, asked)

    def respond(self, now: float) -> discovery_pb2.DeltaDiscoveryResponse | None:
        """Return the next response to send, or None when Envoy has, or is about to answer for, all that it may have now."""
        self._try_listeners_again(now)
        # Twice, as looking at the hostnames may show that clusters no longer wait for them.
        for kind, channel in sorted(self._channels.items(), key=_rank) * 2:
            silent = channel.wildcard and not channel.nonce
            if kind in self._withheld:
                continue
            if kind is Kind.HOST:
                self._choose_hostnames(channel)
            asked = kind is Kind.HOST and bool(self._asked.waiting)
            if channel.in_flight is None and (channel.dirty or asked or silent) and not self._must_wait(kind, now):
                batch = self._next_batch(kind, channel)
                missed = self._asked.missed(self._there, now, along=bool(batch)) if asked else []
                if batch or silent or missed:
                    return self._response(kind, channel, batch, missed)
        return None

    def _try_listeners_again(self, now: float) -> None:
        if self._listen_again is not None and now >= self._listen_again:
            self._listen_again, self._shut = None, False
            self._channels[Kind.LISTENER].dirty.update(self._verdicts.doubt(Kind.LISTENER))
        if self._shut and self._listen_again is None:
            self._listen_again = now + LISTEN_AGAIN_S

    def _choose_hostnames(self, channel: _Channel) -> None:
        self._asked.resolve()
        channel.dirty.update(self._asked.names)
        if self._all != self._hostnames.all:
            self._all = self._hostnames.all
            channel.dirty.update(self._resources[Kind.HOST])

    def _there(self, host: str) -> bool:
        return self._verdicts.choose((Kind.HOST, host), self._resources[Kind.HOST].get(host)) is not None

    def _must_wait(self, kind: Kind, now: float) -> bool:
        """A hostname or port comes after the clusters that it leads to, so that no request finds a gap."""
        if kind not in (Kind.HOST, Kind.LISTENER):
            return False
        clusters = self._channels.get(Kind.CLUSTER)
        if not self._awaited and not (clusters and clusters.in_flight):
            self._held_until = None
            return False
        if self._held_until is None:
            self._held_until = now + HOLD_S
        if now < self._held_until:
            return True
        self._held_until = None
        self._awaited.clear()
        return False

    def _next_batch(self, kind: Kind, channel: _Channel) -> dict[str, Resource | None]:
        batch: dict[str, Resource | None] = {}
        suspects: dict[str, Resource | None] = {}
        again = self._asked.names if kind is Kind.HOST else {}
        if kind is Kind.SECRET:
            channel.dirty.update(self._secrets.bound(channel.dirty))
        for name in sorted(channel.dirty, key=order if kind is Kind.HOST else None):
            if not channel.wildcard and name not in channel.subscribed:
                channel.dirty.discard(name)
                continue
            if kind is Kind.SECRET:
                kept_back = self._secrets.withholds(name)
            else:
                kept_back = kind is Kind.HOST and not self._hostnames.shows(name)
            wanted = None if kept_back else self._verdicts.choose((kind, name), self._resources[kind].get(name))
            if name == SHOWN and wanted is None:
                channel.dirty.discard(name)  # there will be one: what Envoy has of an earlier process is good until then
                continue
            absent = wanted is None and name not in channel.sent and name not in channel.unanswered
            if absent or (wanted and channel.sent.get(name) == wanted.version and name not in again):
                channel.dirty.discard(name)
                channel.unanswered.discard(name)
            elif wanted is None and kind is Kind.CLUSTER and self._places_pending():
                continue  # it goes after the hostnames and ports that led to it
            elif (kind, name) in self._verdicts.suspects:
                suspects[name] = wanted
            elif len(batch) < RESPONSE_RESOURCES_MAX:
                batch[name] = wanted
        return batch or dict(list(suspects.items())[:1])

    def _places_pending(self) -> bool:
        places = (self._channels.get(kind) for kind in (Kind.HOST, Kind.LISTENER))
        return any(each is not None and bool(each.dirty or each.in_flight) for each in places)

    def _response(
        self, kind: Kind, channel: _Channel, batch: dict[str, Resource | None], missed: Sequence[str]
    ) -> discovery_pb2.DeltaDiscoveryResponse:
        self._nonce += 1
        channel.nonce = str(self._nonce)
        channel.in_flight = batch
        message = discovery_pb2.DeltaDiscoveryResponse(type_url=kind, nonce=channel.nonce, system_version_info=channel.nonce)
        for name, resource in batch.items():
            channel.dirty.discard(name)
            channel.unanswered.discard(name)
            if resource is None:
                channel.sent.pop(name, None)
                if kind is Kind.SECRET and self._secrets.withdraw(name):
                    # Envoy asks again when the next client says this name.
                    channel.subscribed.discard(name)
                message.removed_resources.append(name)
                continue
            if kind is Kind.CLUSTER:
                self._expect_endpoints(name)
            channel.sent[name] = resource.version
            part = message.resources.add(name=name, version=resource.version)
            part.resource.type_url = kind
            part.resource.value = resource.body
            if kind is Kind.HOST:
                part.aliases.extend(self._asked.names.get(name, ()))
        if kind is Kind.HOST:
            if missed:
                # Of a version that it had before, Envoy would take it for a sign of life.
                message.resources.add(name=MISSED, version=channel.nonce, aliases=missed)
            self._asked.told(alias for part in message.resources for alias in part.aliases)
        return message

    def _expect_endpoints(self, cluster: str) -> None:
        endpoints = self._channels.get(Kind.ENDPOINTS)
        if endpoints is None or cluster not in endpoints.subscribed:
            self._awaited.add(cluster)
        else:
            # A cluster that changes starts without endpoints, and Envoy does not ask for those it had a second time.
            endpoints.sent.pop(cluster, None)
            endpoints.dirty.add(cluster)

    def _answer(self, kind: Kind, channel: _Channel, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        batch, channel.in_flight = channel.in_flight or {}, None
        refused = request.HasField("error_detail")
        if kind is Kind.HOST:
            self._asked.answered(refused=refused)
        for name, resource in batch.items():
            if not refused:
                self._verdicts.take((kind, name), resource)
                if resource is None:
                    channel.applied.pop(name, None)
                else:
                    channel.applied[name] = resource.version
            else:
                self._back(kind, channel, name, resource, request.error_detail.message if len(batch) == 1 else None)
            if kind is Kind.ENDPOINTS or (kind is Kind.CLUSTER and (refused or resource is None)):
                self._awaited.discard(name)

    def _back(self, kind: Kind, channel: _Channel, name: str, resource: Resource | None, words: str | None) -> None:
        """Note that Envoy still has what it had; `words` None: of several, nobody knows yet which it did not want."""
        if name in channel.applied:
            channel.sent[name] = channel.applied[name]
        else:
            channel.sent.pop(name, None)
        if words is None:
            self._verdicts.suspects.add((kind, name))
            channel.dirty.add(name)
        elif resource is not None:
            self._verdicts.refuse((kind, name), resource, words)
            channel.dirty.add(name)
            self._shut |= kind is Kind.LISTENER
            if kind is Kind.SECRET:
                channel.unanswered.add(name)


def _rank(item: tuple[Kind, _Channel]) -> int:
    return _ORDER.index(item[0])


_ORDER = tuple(Kind)
