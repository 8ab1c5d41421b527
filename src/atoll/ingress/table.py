"""The routing of all apps as Envoy's resources, kept up to date by what changes. No I/O: batches in, resources out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from msgspec import UNSET
from msgspec.structs import replace

from atoll.ingress import clusters, hosts, limits, listeners, resources
from atoll.ingress.clusters import Nearness
from atoll.ingress.hosts import Leg
from atoll.ingress.http3 import HOSTS_MAX as HTTP3_HOSTS_MAX
from atoll.ingress.http3 import HTTP3, Http3
from atoll.ingress.legs import Places, canary_of, legs_of, limits_of, targets_of
from atoll.ingress.resources import HostPath, Kind, Name, Problem, Resource, Target
from atoll.ingress.sleepers import serving, socket_of, wake_s
from atoll.ingress.udp_room import UdpRoom
from atoll.model.certificates import wildcard_of, wildcards_over
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Endpoint, Routing


class RoutingTable:
    """`resources` is always whole: every virtual host in it leads to clusters in it, and no hostname is there twice.

    Of two apps that claim one hostname and path, the one that had it first keeps it; the control plane allows no such
    claims, but Envoy would refuse everything if one slipped through.
    """

    def __init__(self, near: Nearness = Nearness()) -> None:
        self.resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
        self._changed: set[Name] = set()
        for fixed in (hosts.route_configuration(), hosts.nobody(), hosts.anybody(), limits.rate_filter({})):
            self._write(fixed)
        self._routings: dict[str, Routing] = {}
        self._claims: dict[HostPath, dict[str, tuple[Leg, ...]]] = {}
        """Place → app → where it leads, the first app being the one that has it."""
        self._places: dict[str, Places] = {}
        """App → all that it says of places, what cannot be routed among it."""
        self._near = near
        self._spread: dict[str, frozenset[str]] = {}
        """App → the sites that it has been at, of those that have been at several."""
        self.changes = 0
        """How often an app has changed or gone."""
        self._zones: dict[str, dict[str, int]] = {}
        """App → what Envoy counts its releases under → the release."""
        self._names: dict[str, tuple[str, ...]] = {}
        """App → its clusters."""
        self._previews: dict[str, dict[Target, set[str]]] = {}
        """App → what leads to some of its instances alone, or did → the instances that are or were led to by it."""
        self._wide: dict[str, int] = {}
        """App → how many of the nearest levels of sites count as one, of those where it is more than the nearest."""
        self._draining: set[str] = set()
        """Apps of which something drains."""
        self._limits: dict[str, dict[limits.Subject, limits.Limit]] = {}
        """App → what its requests are limited by, of those that have a limit."""
        self._paths: dict[str, set[str]] = {}
        """Hostname → the paths that are claimed on it."""
        self._clusters: dict[str, set[str]] = {}
        """App → the clusters that it has in `resources`."""
        self._sleepers: set[Target] = set()
        self._counted: set[str] = set()
        """Apps that scale by their requests."""
        self.address = "127.0.0.1"
        """Where the ingress listens. Set before the first batch."""
        self.also = ""
        """Where it listens beside that; empty for nowhere. Set before the first batch."""
        self.udp_waker: Callable[[Target], int] = lambda target: 0
        """At which port of the loopback address a datagram wakes an app; 0 for none. Set before the first batch."""
        self.udp_room = UdpRoom(clusters.UDP_CLIENTS_MAX)
        self._udp_clients: dict[str, int] = {}
        """Cluster of a UDP port → how many clients Envoy lets it have."""
        self.https_port = 0
        """Where Envoy speaks TLS; 0 for nowhere. Set before the first batch."""
        self.serves: Callable[[str], bool] = lambda host: True
        """Whether a hostname has a certificate; nobody is led to TLS where it has none. Set before the first batch."""
        self.shows: Callable[[str], bool] = lambda host: False
        """Whether a certificate is there for just this name. Set before the first batch."""
        self.http3: Http3 | None = None
        """How HTTP/3 is served; None where it is not. Set before the first batch."""
        self._strict: dict[str, tuple[bool, bool]] = {}
        """Hostname that has to do with TLS → whether it was served with it, and had a certificate, when it was written."""
        self.http3_hosts: set[str] = set()
        """Hostnames that are served by HTTP/3. To be read only; always the same set."""
        self._fast_changed = False
        self._answers: Mapping[str, Mapping[str, str]] = {}
        """Host → token → what certificate authorities look for there."""
        self._problems: dict[str, tuple[Problem, ...]] = {}
        """Of those apps only that have any."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What was left out of the resources, and why."""
        return tuple(problem for each in self._problems.values() for problem in each)

    @property
    def apps(self) -> int:
        return len(self._routings)

    def apply(self, batch: RoutingBatch) -> tuple[Problem, ...]:
        """Take over what changed, and return the problems that are new. A complete batch replaces everything."""
        put = {key_of(routing): routing for routing in batch.put}
        gone = set(self._routings) - set(put) - set(batch.kept) if batch.complete else set(batch.removed) - set(put)
        before = set(self.problems)
        names: set[str] = set()
        for key in sorted(gone):
            names |= self._remove(key)
        for key, routing in sorted(put.items()) if batch.complete else put.items():
            names |= self._put(key, routing)
        for host in names:
            self._write_host(host)
        for host in (settled := self.udp_room.settle()):
            self._write_udp(host)
        for key in self._claimants(names | settled) | put.keys():
            problems = self._problems_of(key)
            if problems:
                self._problems[key] = problems
            else:
                self._problems.pop(key, None)
        self._sweep(gone | set(put))
        self._write_limits(gone | set(put))
        return tuple(problem for problem in self.problems if problem not in before)

    def take_changes(self) -> set[Name]:
        """Return what was written or erased since the last call."""
        if self._fast_changed and self.http3 is not None:
            self._fast_changed = False
            if self.http3_hosts:
                self._write(self.http3.listener(sorted(self.http3_hosts)))
            else:
                self._erase(Kind.LISTENER, HTTP3)
        changed, self._changed = self._changed, set()
        return changed

    def draining(self) -> Iterable[tuple[str, Endpoint]]:
        """Yield every endpoint that must lose its requests, with its app's key."""
        for key in sorted(self._draining):
            for endpoint in _every(self._routings[key]):
                if endpoint.draining:
                    yield key, endpoint

    def releases(self) -> Iterable[tuple[str, dict[str, int], bool]]:
        """Yield for every cluster which release Envoy counts under which zone, and whether several of them serve."""
        for key, zones in self._zones.items():
            for cluster in self.clusters_of(key):
                yield cluster, zones, len(zones) > 1

    def clusters_of(self, key: str) -> tuple[str, ...]:
        """Return the names of the app's clusters."""
        return self._names.get(key, ())

    def sleepers(self) -> set[Target]:
        """Return the ports of apps that wake when a request comes; another set whenever they have changed."""
        return self._sleepers

    def counted(self) -> frozenset[str]:
        """Return the apps whose requests under way are to be told of."""
        return frozenset(self._counted)

    def _sleep(self, before: set[Target], after: set[Target]) -> None:
        if before != after:
            self._sleepers = (self._sleepers - before) | after

    def routing_of(self, key: str) -> Routing | None:
        """Return an app's routing, as it was last told."""
        return self._routings.get(key)

    def project_of(self, host: str) -> str | None:
        """Return the project whose app answers at `host`, be it by a wildcard; None where there is none.

        A hostname is one project's. Where an older store has several on it, the shortest path says whose.
        """
        for name in (host, *wildcards_over(host)):
            owner = self.owner_of(name)
            if owner is not None:
                return owner.partition("/")[0]
        return None

    def challenge(self, answers: Mapping[str, Mapping[str, str]], changed: Iterable[str]) -> None:
        """Answer what certificate authorities look for: host → token → text, of which that of the hosts `changed` is new."""
        self._answers = answers
        for host in changed:
            self._write_host(host)

    def certified(self, changed: Collection[str] | None) -> None:
        """Take over which hostnames have a certificate now, after those of `changed` have; None for all."""
        touched = {*changed, *(over for host in changed for over in wildcards_over(host))} if changed is not None else None
        for host, served in list(self._strict.items()):
            if (touched is None or host in touched or wildcard_of(host) in touched) and self._tls_of(host) != served:
                self._write_host(host)

    def endpoints_of(self, key: str) -> tuple[Endpoint, ...]:
        """Return an app's endpoints, draining ones among them; none for an app that is not there."""
        routing = self._routings.get(key)
        return routing.endpoints if routing is not None else ()

    def starting_of(self, key: str) -> tuple[Endpoint, ...]:
        """Return where an app's instances will be (`Routing.starting`)."""
        routing = self._routings.get(key)
        return routing.starting if routing is not None else ()

    def knows(self, address: str) -> bool:
        """Whether an app that wakes has an endpoint at `address`."""
        keys = {f"{target.project}/{target.app}" for target in self._sleepers}
        return any(endpoint.address == address for key in keys for endpoint in self.endpoints_of(key))

    def owner_of(self, host: str) -> str | None:
        """Return the app (`PROJECT/NAME`) that a hostname leads to at its shortest path."""
        paths = self._paths.get(host)
        return next(iter(self._claims[HostPath(host, min(paths))])) if paths else None

    def _put(self, key: str, routing: Routing) -> set[str]:
        old = self._routings.get(key)
        if old == routing:
            return set()
        if old is not None and replace(old, starting=routing.starting) == routing:
            self._routings[key] = routing  # nothing that Envoy is told
            return set()
        before, places = self._places.get(key, {}), legs_of(routing)
        self._routings[key], self._places[key] = routing, places
        self._sleep(_wakeable(old, before), _wakeable(routing, places))
        self.changes += 1
        every = _every(routing)
        numbers = {endpoint.release for endpoint in every} | routing.weights.keys()
        self._zones[key] = {resources.zone_of(number): number for number in sorted(numbers - {0})}
        self._keep_previews(key, routing, every)
        targets = self._targets(key)
        self._names[key] = tuple(sorted(target.cluster for target in targets))
        draining = any(endpoint.draining for endpoint in every)
        (self._draining.add if draining else self._draining.discard)(key)
        sites = frozenset(endpoint.site for endpoint in every) | self._spread.get(key, frozenset())
        if len(sites) > 1:
            self._spread[key] = sites
        scale = routing.spec.scale
        (self._counted.add if scale is not UNSET and scale.counts_requests else self._counted.discard)(key)
        counted = set()
        asleep_s = wake_s(routing) if routing.wakes else 0.0
        for target in targets:
            # Envoy counts requests of a cluster that changes anew, and a drain waits for what is counted.
            if not draining or target.cluster not in self.resources[Kind.CLUSTER]:
                self._write(clusters.cluster(target, routing.spec.ingress, sites=len(sites) > 1, wake_s=asleep_s))
                if target.raw == "udp" and self._count_clients(target, routing):
                    counted |= {place.host for place, legs in places.items() if any(leg.target == target for leg in legs)}
            self._write(self._endpoints(target, routing))
        return counted | (self._claim(key, before, places) if old is None or before != places else set())

    def _keep_previews(self, key: str, routing: Routing, every: Collection[Endpoint]) -> None:
        """An instance that nobody is led to by a preview any more may be at work on requests that came by it: Envoy counts those as
        long as the cluster has it, and a drain waits for what is counted."""
        before, there = self._previews.pop(key, {}), {endpoint.instance for endpoint in every}
        found = {target: instances & there for target, instances in before.items()}
        for target in targets_of(self._places[key]):
            if target.preview:
                found[target] = found.get(target, set()) | {endpoint.instance for endpoint in _previewed(routing)}
        if kept := {target: instances for target, instances in found.items() if instances}:
            self._previews[key] = kept

    def _targets(self, key: str) -> set[Target]:
        """Return the ports of the app that have a cluster."""
        return targets_of(self._places[key]) | self._previews.get(key, {}).keys()

    def _count_clients(self, target: Target, routing: Routing) -> bool:
        """Take down how many clients a UDP port may have; return whether that is news."""
        before, now = self._udp_clients.get(target.cluster), clusters.udp_clients(routing.spec.ingress)
        self._udp_clients[target.cluster] = now
        return before != now

    def move(self, near: Nearness) -> None:
        """Take over how far the sites are from here."""
        if near.site == self._near.site and self._near.holds(near.ms):
            return
        self._near = near
        for key in self._spread:
            for target in self._targets(key):
                self._write(self._endpoints(target, self._routings[key]))

    def spilling(self) -> dict[str, int]:
        """Return app → the most requests for each instance, of those at several sites that say so."""
        found = {key: self._routings[key].spec.ingress for key in self._spread}
        return {key: rules.spill for key, rules in found.items() if rules is not None and rules.spill is not None}

    def serving_by_level(self, key: str) -> tuple[int, ...]:
        """Return how many endpoints of an app serve at each level of sites, the nearest first."""
        routing = self._routings[key]
        levels = clusters.levels_of(routing.endpoints, routing.weights, self._near)
        return tuple(sum(not place.draining for place in level) for level in levels)

    def widen(self, key: str, levels: int) -> None:
        """Have so many of the nearest levels of sites get the app's requests alike."""
        if self._wide.get(key, 1) != levels:
            self._wide[key] = levels
            for target in self._targets(key):
                self._write(self._endpoints(target, self._routings[key]))

    def _endpoints(self, target: Target, routing: Routing) -> Resource:
        if not target.preview:
            asleep = routing.wakes and not serving(routing.endpoints)
            activator = (self.udp_waker(target) or None if target.raw == "udp" else socket_of(target)) if asleep else None
            wide = self._wide.get(key_of(routing), 1)
            return clusters.endpoints(target, routing.endpoints, routing.weights, activator=activator, near=self._near, wide=wide)
        key = key_of(routing)
        if target in targets_of(self._places[key]):
            places, weights = _previewed(routing), {}
        else:  # until Envoy has the new routes, who comes by the old ones goes where all go
            places, weights = routing.endpoints, routing.weights
        kept = self._previews.get(key, {}).get(target, set()) - {endpoint.instance for endpoint in places}
        left = (replace(endpoint, draining=True) for endpoint in _every(routing) if endpoint.instance in kept)
        return clusters.endpoints(target, (*places, *left), weights, near=self._near)

    def _write_limits(self, keys: Iterable[str]) -> None:
        before = {key: self._limits[key] for key in keys if key in self._limits}
        for key in keys:
            routing = self._routings.get(key)
            found = limits_of(routing) if routing is not None else {}
            if found:
                self._limits[key] = found
            else:
                self._limits.pop(key, None)
        if before != {key: self._limits[key] for key in keys if key in self._limits}:
            self._write(limits.rate_filter({subject: limit for each in self._limits.values() for subject, limit in each.items()}))

    def _claim(self, key: str, before: Places, places: Places) -> set[str]:
        """Claim the app's places instead of those it had; return the hostnames that this may change."""
        wanted = {place: good for place, legs in places.items() if (good := _possible(place, legs))}
        changed = {place.host for place in wanted if before.get(place) != places[place]}
        for place in self._held(key, before):
            if place not in wanted:
                changed.add(place.host)
                self._unclaim(place, key)
        for place, legs in wanted.items():
            self._claims.setdefault(place, {})[key] = legs
            self._paths.setdefault(place.host, set()).add(place.path)
        return changed

    def _unclaim(self, place: HostPath, key: str) -> None:
        claims = self._claims[place]
        del claims[key]
        if not claims:
            del self._claims[place]
            self._paths[place.host].discard(place.path)
            if not self._paths[place.host]:
                del self._paths[place.host]

    def _claimants(self, hosts: Iterable[str]) -> set[str]:
        return {key for host in hosts for path in self._paths.get(host, ()) for key in self._claims[HostPath(host, path)]}

    def _problems_of(self, key: str) -> tuple[Problem, ...]:
        routing = self._routings[key]
        problems = []
        for endpoint in _every(routing):
            why = resources.check_address(endpoint.address)
            if why is not None:
                problems.append(Problem(key, f"instance {endpoint.instance}: {why}"))
        for place, legs in self._places[key].items():
            why = resources.check_host_path(place.host, place.path)
            if why is None:
                why = next((f"{leg.target.port} is not a port" for leg in legs if not 0 < leg.target.port < 65_536), None)
            if why is None and self._speaks(place.host):
                why = f"{place.host} is where this ingress speaks HTTP/3"
            if why is None:
                owner = next(iter(self._claims[place]))
                why = self.udp_room.why_not(place.host) if owner == key else f"{place.host}{place.path} belongs to {owner}"
            if why is not None:
                problems.append(Problem(key, why))
        return tuple(problems)

    def _remove(self, key: str) -> set[str]:
        routing = self._routings.pop(key, None)
        before = self._places.pop(key, {})
        self._sleep(_wakeable(routing, before), set())
        for kept in (self._zones, self._names, self._previews, self._spread, self._wide):
            kept.pop(key, None)
        self._draining.discard(key)
        self.changes += 1
        self._counted.discard(key)
        self._problems.pop(key, None)
        if routing is None:
            return set()
        held = self._held(key, before)
        for place in held:
            self._unclaim(place, key)
        return {place.host for place in held}

    def _held(self, key: str, places: Places) -> list[HostPath]:
        """Return those of `places` that the app claims."""
        return [place for place in places if key in self._claims.get(place, {})]

    def _write_host(self, host: str) -> None:
        name = f"{resources.ROUTE_CONFIG}/{host}"
        challenges = self._answers.get(host, {}) if resources.check_host_path(host, "/") is None else {}
        # A host that is written for its challenges alone would hide the wildcard that leads it.
        names = (host, *wildcards_over(host)) if challenges else (host,)
        led = next((each for each in names if self._paths.get(each)), host)
        routes = [(path, next(iter(self._claims[HostPath(led, path)].values()))) for path in self._paths.get(led, ())]
        self._strict.pop(host, None)
        if (public := resources.public_of(host)) is not None:
            # The API refuses such a port, but knows only ingresses that were there before.
            if public[0] == "udp":
                self._ask_for_udp(host, [] if self._speaks(host) else routes)
            else:
                self._write_listener(host, public, routes)
            return
        served = shown = True
        rules = [leg.rules for _, legs in routes for leg in legs if leg.rules is not None]
        fast = self.http3 is not None and any(each.http3 for each in rules)
        if self.https_port and (fast or any(each.https_only for each in rules)):
            served, shown = self._strict[host] = self._tls_of(host)
        fast = fast and shown and (host in self.http3_hosts or len(self.http3_hosts) < HTTP3_HOSTS_MAX)
        if fast != (host in self.http3_hosts):
            self.http3_hosts ^= {host}
            self._fast_changed = True
        if routes or challenges:
            port = self.http3.port if self.http3 is not None and fast else 0
            made = hosts.virtual_host(
                host, routes, https_port=self.https_port, served=served, challenges=challenges, http3_port=port
            )
            self._write(made)
        else:
            self._erase(Kind.HOST, name)

    def _speaks(self, host: str) -> bool:
        """Whether this place is the port at which the ingress itself speaks HTTP/3."""
        return self.http3 is not None and resources.public_of(host) == ("udp", self.http3.port)

    def _tls_of(self, host: str) -> tuple[bool, bool]:
        return self.serves(host), self.shows(host)

    def _ask_for_udp(self, host: str, routes: list[tuple[str, tuple[Leg, ...]]]) -> None:
        if routes:
            cluster = routes[0][1][0].target.cluster
            self.udp_room.ask(host, cluster, self._udp_clients.get(cluster, clusters.UDP_SESSIONS_MAX))
        else:
            self.udp_room.leave(host)

    def _write_udp(self, host: str) -> None:
        public = resources.public_of(host)
        if public is not None:
            paths = self._paths.get(host, ()) if self.udp_room.is_open(host) else ()
            self._write_listener(host, public, [(path, next(iter(self._claims[HostPath(host, path)].values()))) for path in paths])

    def _write_listener(self, name: str, public: tuple[str, int], routes: list[tuple[str, tuple[Leg, ...]]]) -> None:
        if routes:
            (leg,) = routes[0][1]
            self._write(listeners.listener(name, self.address, public, leg.target, also=self.also))
        else:
            self._erase(Kind.LISTENER, name)

    def _sweep(self, keys: Iterable[str]) -> None:
        """Remove the clusters of `keys` that nothing leads to any more."""
        for key in keys:
            wanted = set(self.clusters_of(key))
            for kind in (Kind.CLUSTER, Kind.ENDPOINTS):
                for name in self._clusters.get(key, set()) - wanted:
                    self._erase(kind, name)
                    self._udp_clients.pop(name, None)
            if wanted:
                self._clusters[key] = wanted
            else:
                self._clusters.pop(key, None)

    def _write(self, resource: Resource) -> None:
        if self.resources[resource.kind].get(resource.name) != resource:
            self.resources[resource.kind][resource.name] = resource
            self._changed.add((resource.kind, resource.name))

    def _erase(self, kind: Kind, name: str) -> None:
        if self.resources[kind].pop(name, None) is not None:
            self._changed.add((kind, name))


def key_of(routing: Routing) -> str:
    return f"{routing.project}/{routing.app}"


def _possible(place: HostPath, legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Return the legs that Envoy can take."""
    if resources.check_host_path(place.host, place.path) is not None:
        return ()
    return tuple(leg for leg in legs if 0 < leg.target.port < 65_536)


def _wakeable(routing: Routing | None, places: Places) -> set[Target]:
    if routing is None or not routing.wakes:
        return set()
    return {target for target in targets_of(places) if not target.preview}


def _previewed(routing: Routing) -> tuple[Endpoint, ...]:
    """Return the endpoints that requests are led to by a preview."""
    return routing.preview.endpoints if routing.preview is not None else canary_of(routing)


def _every(routing: Routing) -> tuple[Endpoint, ...]:
    """Return all endpoints of the app, each once: those of its preview among them."""
    preview = routing.preview.endpoints if routing.preview is not None else ()
    known = {endpoint.instance for endpoint in routing.endpoints}
    return (*routing.endpoints, *(endpoint for endpoint in preview if endpoint.instance not in known))
