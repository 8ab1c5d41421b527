"""Where each record lives in the store. A prefix ends in `/`, so that `apps/a/` never finds `apps/ab/…`."""

from __future__ import annotations

PROJECTS = "projects/"
APPS = "apps/"
APP_STATUSES = "app-statuses/"
RELEASES = "releases/"
JOBS = "jobs/"
JOB_STATUSES = "job-statuses/"
INSTANCES = "instances/"
STATUSES = "statuses/"
NODES = "nodes/"
SITES = "sites/"
ROUND_TRIPS = "round-trips/"
NODE_POLICIES = "node-policies/"
NODE_LIVENESS = "node-liveness/"
PREFETCHES = "prefetches/"
BRAKES = "brakes/"
BRAKE_RELEASES = "brake-releases/"
MAINTENANCES = "maintenances/"
RESERVATIONS = "reservations/"
TOKENS = "tokens/"
SECRETS = "secrets/"
EVENTS = "events/"
DRAINED = "drained/"
INGRESSES = "ingresses/"
ROUTES = "routes/"
"""`routes/HOST/PATH` → the app that owns it, so that two apps cannot claim one."""
ROUTE_HOSTS = "route-hosts/"
"""`route-hosts/HOST` → the project that claimed a path of it last: two claims at once meet here. Whose it is the claims say."""
REQUESTS = "requests/"
FABRICS = "fabrics/"
FABRIC_IPV6S = "fabric-ipv6s/"
FABRIC_NODES = "fabric-nodes/"
FABRIC_PATHS = "fabric-paths/"
AUTHORITIES = "authorities/"
JOIN_TOKENS = "join-tokens/"
IDENTITIES = "identities/"
SERVERS = "servers/"
"""Under each server's lease."""
CERTIFICATES = "certificates/"
CERTIFICATE_STATUSES = "certificate-statuses/"
CERTIFICATE_ROOTS = "certificate-roots/"
ACME_SETTINGS = "acme-settings/"
CELL_KEY = "cell/key"
"""A keyed digest that only the cell's key makes, so that a server with another key says so before it writes anything."""
CELL_DATA = "cell/data"
"""The version of Atoll's data that the records are written for (`membership.DATA_VERSION`); absent at the first."""
LEADER = "leader"
"""Held under a lease by the leading server; its create revision is the fencing token."""


def project(name: str) -> str:
    return f"{PROJECTS}{name}"


def app(project: str, name: str) -> str:
    return f"{APPS}{project}/{name}"


def app_status(project: str, name: str) -> str:
    return f"{APP_STATUSES}{project}/{name}"


def release(project: str, app: str, number: int) -> str:
    return f"{RELEASES}{project}/{app}/{number:08d}"


def job(project: str, name: str) -> str:
    return f"{JOBS}{project}/{name}"


def job_status(project: str, name: str) -> str:
    return f"{JOB_STATUSES}{project}/{name}"


def instance(project: str, id: str) -> str:
    return f"{INSTANCES}{project}/{id}"


def status(project: str, instance: str) -> str:
    return f"{STATUSES}{project}/{instance}"


def node(name: str) -> str:
    return f"{NODES}{name}"


def site(name: str) -> str:
    return f"{SITES}{name}"


def round_trips(ingress: str) -> str:
    return f"{ROUND_TRIPS}{ingress}"


def node_policy(name: str) -> str:
    return f"{NODE_POLICIES}{name}"


def node_liveness(name: str) -> str:
    return f"{NODE_LIVENESS}{name}"


def brake() -> str:
    return f"{BRAKES}cell"


def brake_release() -> str:
    return f"{BRAKE_RELEASES}cell"


def prefetch(node: str) -> str:
    return f"{PREFETCHES}{node}"


def maintenance(name: str) -> str:
    return f"{MAINTENANCES}{name}"


def reservation(name: str) -> str:
    return f"{RESERVATIONS}{name}"


def token(digest: str) -> str:
    return f"{TOKENS}{digest}"


def secret(project: str, name: str) -> str:
    return f"{SECRETS}{project}/{name}"


def event(project: str, id: str) -> str:
    return f"{EVENTS}{project}/{id}"


def drained(instance: str, ingress: str) -> str:
    return f"{DRAINED}{instance}/{ingress}"


def ingress(name: str) -> str:
    return f"{INGRESSES}{name}"


def route(host: str, path: str) -> str:
    return f"{ROUTES}{host}{path}"


def route_host(host: str) -> str:
    return f"{ROUTE_HOSTS}{host}"


def request(token_id: str, key: str) -> str:
    return f"{REQUESTS}{token_id}/{key}"


def fabric() -> str:
    return f"{FABRICS}cell"


def fabric_ipv6() -> str:
    return f"{FABRIC_IPV6S}cell"


def fabric_paths(node: str) -> str:
    return f"{FABRIC_PATHS}{node}"


def fabric_node(name: str) -> str:
    return f"{FABRIC_NODES}{name}"


def authority(id: str) -> str:
    return f"{AUTHORITIES}{id}"


def join_token(id: str) -> str:
    return f"{JOIN_TOKENS}{id}"


def identity(kind: str, name: str) -> str:
    return f"{IDENTITIES}{kind}/{name}"


def certificate(host: str) -> str:
    return f"{CERTIFICATES}{host}"


def certificate_status(host: str) -> str:
    return f"{CERTIFICATE_STATUSES}{host}"


def certificate_root(of: str = "cell") -> str:
    return f"{CERTIFICATE_ROOTS}{of}"


def acme_settings() -> str:
    return f"{ACME_SETTINGS}cell"


def server(id: str) -> str:
    return f"{SERVERS}{id}"
