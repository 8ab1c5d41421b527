"""The API over HTTP, in process: who may do what, what bad input is answered with, how repeats and conditions work."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest

from atoll.api.http.app import ROUTES, create_app
from atoll.api.http.openapi import describe
from atoll.api.service import KINDS, SYSTEM, Need, Service
from atoll.model import codec, keys
from atoll.model.ports.clock import SystemClock
from atoll.model.records import Capacity, Instance, Node, OwnerKind, Role
from atoll.model.views import TokenRequest
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

SPEC = {"name": "web", "image": "registry.test/web:1", "ports": [{"port": 8000}]}
WEB = "/v1/projects/default/apps/web"


class Api:
    """A client that holds a token of every kind."""

    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self.service = service
        self.client = client
        self.tokens: dict[str, str] = {}

    async def mint(self, name: str, role: Role, project: str = "*", subject: str = "") -> None:
        view = await self.service.tokens.create(SYSTEM, TokenRequest(name=name, role=role, project=project, subject=subject))
        assert view.token is not None
        self.tokens[name] = view.token

    async def call(self, method: str, path: str, body: Any = None, *, who: str = "admin", **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if who:
            sent["authorization"] = f"Bearer {self.tokens[who]}"
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        return await self.client.request(method, path, content=content, headers=sent)

    async def error(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, dict[str, Any]]:
        response = await self.call(method, path, body, **more)
        assert list(response.json()) == ["error"], response.text
        return response.status_code, response.json()["error"]


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state, Service(store, state, clock, random.Random(1), bytes(32)) as service:
        transport = httpx.ASGITransport(create_app(service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            made = Api(service, client)
            await made.mint("admin", Role.ADMIN)
            await made.mint("deployer", Role.DEPLOY, "default")
            await made.mint("reader", Role.READ, "default")
            await made.mint("stranger", Role.DEPLOY, "team")
            await made.mint("agent", Role.AGENT, subject="n1")
            await made.mint("edge", Role.INGRESS, subject="edge")
            yield made
    await store.close()


async def test_an_app_goes_in_and_comes_out_with_its_revision_as_etag(api: Api) -> None:
    put = await api.call("PUT", WEB, SPEC)
    assert put.status_code == 200
    assert put.headers["etag"] == f'"{put.json()["revision"]}"'
    got = await api.call("GET", WEB, who="reader")
    assert got.json() == put.json()
    listed = await api.call("GET", "/v1/projects/default/apps")
    assert listed.json()["items"] == [put.json()]


async def test_a_conditional_write_needs_the_newest_etag(api: Api) -> None:
    first = await api.call("PUT", WEB, SPEC)
    scaled = await api.call("POST", f"{WEB}/scale", {"replicas": 2}, if_match=first.headers["etag"])
    assert scaled.json()["app"]["replicas"] == 2
    status, error = await api.error("POST", f"{WEB}/scale", {"replicas": 3}, if_match=first.headers["etag"])
    assert (status, error["code"], error["retry"]) == (409, "stale-revision", "safe")
    status, error = await api.error("PUT", WEB, SPEC, if_none_match="*")
    assert error["code"] == "stale-revision"
    status, error = await api.error("POST", f"{WEB}/scale", {"replicas": 3}, if_match="soon")
    assert (status, error["field"]) == (400, "If-Match")


async def test_a_repeat_under_one_key_answers_as_the_first_and_another_body_is_refused(api: Api) -> None:
    await api.call("PUT", WEB, SPEC)
    first = await api.call("POST", f"{WEB}/restart", idempotency_key="k1")
    again = await api.call("POST", f"{WEB}/restart", idempotency_key="k1")
    assert again.content == first.content
    assert first.json()["app"]["generation"] == 2
    status, error = await api.error("POST", f"{WEB}/scale", {"replicas": 1}, idempotency_key="k1")
    assert (status, error["code"]) == (409, "conflict")
    status, error = await api.error("POST", f"{WEB}/restart", idempotency_key="a/b")
    assert (status, error["field"]) == (400, "Idempotency-Key")
    other = await api.call("POST", f"{WEB}/restart", who="deployer", idempotency_key="k1")
    assert other.json()["app"]["generation"] == 3, "keys are each caller's own"


async def test_the_whole_life_of_an_app_over_http(api: Api) -> None:
    await api.call("PUT", WEB, SPEC)
    await api.call("PUT", WEB, {**SPEC, "env": {"A": "1"}})
    releases = (await api.call("GET", f"{WEB}/releases")).json()["items"]
    assert [release["number"] for release in releases] == [2, 1]
    assert releases[0]["author"] == "admin"
    back = await api.call("POST", f"{WEB}/rollback")
    assert back.json()["app"]["release"] == 1
    forth = await api.call("POST", f"{WEB}/rollback", {"release": 2})
    assert forth.json()["app"]["release"] == 2
    gone = await api.call("DELETE", WEB)
    assert gone.status_code == 202
    assert gone.json()["app"]["deleting"] is True


async def test_jobs_secrets_tokens_projects_and_nodes_over_http(api: Api) -> None:
    job = await api.call("POST", "/v1/projects/default/jobs", {"name": "crunch", "image": "x:1"}, who="deployer")
    assert job.status_code == 201
    assert (await api.call("POST", "/v1/projects/default/jobs/crunch/cancel")).json()["job"]["cancelled"] is True
    secret = await api.call("PUT", "/v1/projects/default/secrets/key", {"value": "hunter2"})
    assert "hunter2" not in secret.text
    assert "hunter2" not in (await api.call("GET", "/v1/projects/default/secrets", who="deployer")).text
    token = await api.call("POST", "/v1/tokens", {"name": "ci", "role": "read", "project": "default"})
    assert token.status_code == 201
    assert token.json()["token"] not in (await api.call("GET", "/v1/tokens")).text
    assert (await api.call("DELETE", f"/v1/tokens/{token.json()['id']}")).status_code == 200
    assert (await api.call("PUT", "/v1/projects/team")).json()["name"] == "team"
    node = Node(name="n1", capacity=Capacity(cpu_milli=1000, memory_bytes=1 << 30, disk_bytes=1 << 30))
    assert (await api.call("PUT", "/v1/nodes/n1", codec.encode(node), who="agent")).status_code == 204
    assert (await api.call("POST", "/v1/nodes/n1/cordon")).json()["policy"]["cordoned"] is True
    assert (await api.call("GET", "/v1/nodes", who="reader")).json()["items"][0]["node"]["name"] == "n1"
    beat = {"node": "n1", "at": 1.0, "usage": [{"instance": "web-1", "cpu_milli": 5}]}
    assert (await api.call("POST", "/v1/nodes/n1/heartbeat", beat, who="agent")).status_code == 204
    instance = Instance(id="web-1", project="default", owner_kind=OwnerKind.APP, owner="web", node="n1", created_at=1)
    await api.service.context.reach(await api.service.context.store.put(keys.instance("default", "web-1"), codec.encode(instance)))
    assert (await api.call("GET", "/v1/usage?project=default", who="reader")).json()[0]["cpu_milli"] == 5
    assert (await api.call("GET", "/v1/usage", who="stranger")).json() == []
    assert (await api.call("GET", "/v1/projects/default/instances?app=web")).json()["items"][0]["instance"]["id"] == "web-1"
    assert (await api.call("GET", "/v1/projects/default/instances?app=other")).json()["items"] == []


def example(path: str) -> str:
    known = {"project": "default", "app": "web", "job": "crunch", "secret": "key", "node": "n1", "ingress": "edge", "kind": "app"}
    path = path.replace("{maintenance}", "m1")
    path = path.replace("{reservation}", "r1")
    path = path.replace("{site}", "AMS_1")
    path = path.replace("{host}", "www.example.test")
    path = path.replace("{snapshot}", "0" * 64)
    for name in ("project", "app", "job", "secret", "node", "ingress", "kind"):
        path = path.replace(f"{{{name}}}", known[name])
    return path.replace("{instance}", "web-1").replace("{token}", "t1").replace("{gpu}", "GPU-1")


WHO = {
    Need.NOTHING: {"admin", "deployer", "reader", "stranger", "agent", "edge"},
    Need.ANY: {"admin", "deployer", "reader", "stranger", "agent", "edge"},
    Need.READ: {"admin", "deployer", "reader"},
    Need.DEPLOY: {"admin", "deployer"},
    Need.ADMIN: {"admin"},
    Need.ADMIN_OF_PROJECT: {"admin"},
    Need.AGENT: {"agent"},
    Need.INGRESS: {"edge"},
}


@pytest.mark.parametrize("route", [route for route in ROUTES if not route.lines], ids=lambda route: route.run.__name__)
async def test_every_call_is_open_to_its_roles_and_closed_to_all_others(api: Api, route: Any) -> None:
    path = example(route.path)
    for who in ("admin", "deployer", "reader", "stranger", "agent", "edge"):
        response = await api.call(route.method, path, b"{" if route.body else None, who=who)
        allowed = who in WHO[route.need] or (who == "stranger" and route.need is Need.READ and "default" not in path)
        assert (response.status_code not in (401, 403)) == allowed, f"{who}: {response.text}"
    if route.need is not Need.NOTHING:
        response = await api.call(route.method, path, who="")
        assert response.status_code == 401


async def test_an_agent_and_an_ingress_are_only_themselves(api: Api) -> None:
    node = {"name": "n2", "capacity": {"cpu_milli": 1, "memory_bytes": 1, "disk_bytes": 1}}
    assert (await api.error("PUT", "/v1/nodes/n2", node, who="agent"))[0] == 403
    assert (await api.error("PUT", "/v1/nodes/n1", node, who="agent"))[1]["field"] == "name"
    assert (await api.error("GET", "/v1/nodes/n2/assignments", who="agent"))[0] == 403
    assert (await api.error("GET", "/v1/ingresses/other/routing", who="edge"))[0] == 403


async def test_a_withdrawn_token_is_refused_from_the_next_call_on(api: Api) -> None:
    made = (await api.call("POST", "/v1/tokens", {"name": "ci", "role": "read"})).json()
    api.tokens["ci"] = made["token"]
    assert (await api.call("GET", "/v1/info", who="ci")).json()["token"]["id"] == made["id"]
    await api.call("DELETE", f"/v1/tokens/{made['id']}")
    status, error = await api.error("GET", "/v1/info", who="ci")
    assert (status, error["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        (b"", "invalid", "empty"),
        (b"{", "invalid", "JSON"),
        (b"\xff\xfe", "invalid", "JSON"),
        (b'{"name": "\xff"}', "invalid", "JSON"),
        (b"[" * 100_000, "invalid", "a list"),
        (b"null", "invalid", "null"),
        (b'{"name": "web", "image": "x", "replicas": 3}', "invalid", "unknown field"),
        (b'{"name": "web", "image": 5}', "invalid", "image"),
        (b'{"name": "web"}', "invalid", "image"),
        (b'{"image": "x"}', "invalid", "name"),
        (b'{"name": "other", "image": "x"}', "invalid", "path"),
        (b'{"name": "web", "image": "x", "project": "team"}', "invalid", "project"),
        (b'{"name": "web", "image": "x", "kind": "job"}', "invalid", "kind"),
        (b'{"name": "web", "image": "x", "resources": {"memory": "-5MiB"}}', "invalid", "resources.memory"),
        (b'{"name": "web", "image": "x", "resources": {"memory": 1e400}}', "invalid", ""),
        (b'{"name": "web", "image": "x", "scale": {"replicas": 99999999}}', "invalid", "replicas"),
        (b'{"name": "web", "image": "' + b"x" * (2 << 20) + b'"}', "too-large", "bytes"),
    ],
    ids=range(17),
)
async def test_a_bad_body_gets_one_clear_error_and_changes_nothing(api: Api, body: bytes, code: str, word: str) -> None:
    status, error = await api.error("PUT", WEB, body)
    assert status in (400, 413)
    assert error["code"] == code
    assert word in error["message"]
    assert (await api.error("GET", WEB))[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/projects/default/apps/..%2f..%2ftokens",
        "/v1/projects/default/apps/%2e%2e",
        "/v1/projects/..%2fx/apps",
        "/v1/projects/default/apps/WEB",
        "/v1/projects/default/apps/a%00b",
        "/v1/projects/default/apps/web%0a",
        "/v1/projects/default/apps/" + "a" * 300,
        "/v1/nodes/..",
        "/v1/nodes/a%20b",
        "/v1/projects/default/apps/%C3%BC",
        "/nowhere",
    ],
)
async def test_tricks_in_paths_lead_nowhere(api: Api, path: str) -> None:
    status, error = await api.error("GET", path)
    assert status in (400, 404)
    assert error["code"] in ("invalid", "not-found")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=9999", "limit=x", "limit=1&limit=2", "limit=" + "9" * 500, "after=%ff", "a=" + "x" * 62_000]
)
async def test_a_bad_query_is_refused(api: Api, query: str) -> None:
    status, error = await api.error("GET", f"/v1/projects/default/apps?{query}")
    assert (status, error["code"]) == (400, "invalid")


@pytest.mark.parametrize("query", ["kinds=tokens", "kinds=secrets", "kinds=apps,nope", "from=x", "from=-1", "project=team"])
async def test_a_watch_for_what_may_not_be_seen_is_refused(api: Api, query: str) -> None:
    status, _ = await api.error("GET", f"/v1/watch?{query}", who="deployer")
    assert status == (403 if "team" in query else 400)


async def test_a_watch_from_a_revision_that_is_not_held_says_so(api: Api) -> None:
    status, error = await api.error("GET", "/v1/watch?from=999999")
    assert (status, error["code"]) == (410, "compacted")


@pytest.mark.parametrize("header", ["", "Bearer", "Basic eDp5", "Bearer " + "x" * 5000, "Bearer ü", "bearer atoll_x"])
async def test_a_bad_authorization_header_is_refused(api: Api, header: str) -> None:
    response = await api.client.get("/v1/info", headers={"authorization": header.encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_a_method_that_is_not_offered_is_refused_in_our_words(api: Api) -> None:
    response = await api.call("PATCH", WEB, {})
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "invalid"
    assert "PUT" in response.headers["allow"]


async def test_pages_follow_each_other_without_gap(api: Api) -> None:
    for name in "abcde":
        await api.call("PUT", f"/v1/projects/default/apps/{name}", {**SPEC, "name": name})
    names: list[str] = []
    after = ""
    while True:
        page = (await api.call("GET", f"/v1/projects/default/apps?limit=2&after={after}")).json()
        names += [item["app"]["name"] for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert names == list("abcde")


async def test_a_spec_without_project_is_for_the_project_of_the_path(api: Api) -> None:
    await api.call("PUT", "/v1/projects/team")
    put = await api.call("PUT", "/v1/projects/team/apps/web", SPEC, who="stranger")
    assert put.json()["app"]["spec"]["project"] == "team"
    status, error = await api.error("PUT", "/v1/projects/team/apps/web", {**SPEC, "project": "default"}, who="stranger")
    assert (status, error["field"]) == (400, "project")


async def test_an_agent_reports_only_its_own_instances(api: Api) -> None:
    for name, node in (("web-1", "n1"), ("web-2", "n2")):
        instance = Instance(id=name, project="default", owner_kind=OwnerKind.APP, owner="web", node=node, created_at=1)
        await api.service.context.reach(await api.service.context.store.put(keys.instance("default", name), codec.encode(instance)))

    def status(instance: str, phase: str, node: str = "n1") -> dict[str, Any]:
        return {"statuses": [{"instance": instance, "project": "default", "node": node, "phase": phase}]}

    report = "/v1/nodes/n1/statuses"
    assert (await api.error("POST", report, status("web-1", "running"), who="agent"))[0] == 404, "register first"
    node = Node(name="n1", capacity=Capacity(cpu_milli=1000, memory_bytes=1 << 30, disk_bytes=1 << 30))
    await api.call("PUT", "/v1/nodes/n1", codec.encode(node), who="agent")
    assert (await api.call("POST", report, status("web-1", "running"), who="agent")).status_code == 204
    assert (await api.error("POST", report, status("web-2", "running"), who="agent"))[0] == 403
    assert (await api.error("POST", report, status("web-1", "running", "n2"), who="agent"))[0] == 403
    assert (await api.error("POST", report, status("web-1", "lost"), who="agent"))[0] == 400
    assert (await api.call("POST", report, status("gone-1", "running"), who="agent")).status_code == 204
    assert (await api.call("POST", report, status("web-1", "stopped"), who="agent")).status_code == 204
    assert (await api.call("POST", report, status("web-1", "running"), who="agent")).status_code == 204
    view = (await api.call("GET", "/v1/projects/default/instances/web-1")).json()
    assert view["status"]["phase"] == "stopped", "an end is an end"


def test_the_description_is_valid_and_covers_every_route() -> None:
    document = json.loads(describe(ROUTES))
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids)) == len(ROUTES)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in _references(document):
        where: Any = document
        for part in reference.removeprefix("#/").split("/"):
            where = where[part]
    for path, item in document["paths"].items():
        for operation in item.values():
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert operation["responses"]


async def test_the_description_is_served(api: Api) -> None:
    response = await api.call("GET", "/schema/openapi.json", who="")
    assert response.json()["openapi"] == "3.1.0"
    assert (await api.call("GET", "/v1/schema/app", who="")).json()["$schema"]
    assert (await api.error("GET", "/v1/schema/nope", who=""))[0] == 404


async def test_answers_are_what_the_description_says(api: Api) -> None:
    document = json.loads(describe(ROUTES))
    put = (await api.call("PUT", WEB, SPEC)).json()
    schema = {"$ref": "#/components/schemas/AppView", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(put)


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in _references(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in _references(value)]
    return []
