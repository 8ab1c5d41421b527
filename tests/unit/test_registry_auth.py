"""What a node shows to private registries: the file of `docker login`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from test_images_lying_registry import PATIENCE, FakeRegistry, Request, on, respond

from atoll.entry.config import Config
from atoll.entry.process import parse
from atoll.images.registry import Registries
from atoll.images.registry_auth import HUB, RegistryAuth
from atoll.model.errors import ImageError, Invalid


def write(file: Path, **auths: dict[str, str]) -> None:
    """Write it as another program would: in place of the former one."""
    made = file.with_suffix(".new")
    made.write_text(json.dumps({"auths": {name.replace("_", "."): one for name, one in auths.items()}, "credsStore": "x"}))
    made.rename(file)


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_a_private_registry_is_shown_what_the_file_says_also_once_that_has_changed(tmp_path: Path) -> None:
    file, wanted = tmp_path / "auth.json", basic("me", "first:with colon")

    async def guarded(request: Request, writer: asyncio.StreamWriter) -> bool:
        if request.headers.get("authorization") == f"Basic {wanted}":
            return False
        respond(writer, 401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return True

    async with FakeRegistry() as registry:
        registry.handlers.append(on("/v2/", guarded))
        file.write_text(json.dumps({"auths": {f"http://{registry.host}/v2/": {"auth": wanted}}}))
        registries = Registries(patience=PATIENCE, find=RegistryAuth(file))
        source = registries.source(f"{registry.host}/app:1")
        assert (await source.resolve()).digest
        wanted = basic("me", "second")
        with pytest.raises(ImageError):
            await registries.source(f"{registry.host}/app:1").resolve()
        made = file.with_suffix(".new")
        made.write_text(json.dumps({"auths": {registry.host: {"username": "me", "password": "second"}}}))
        made.rename(file)
        assert (await registries.source(f"{registry.host}/app:1").resolve()).digest
        await registries.aclose()


def test_hosts_are_found_however_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "auth.json"
    names = ["https://index.docker.io/v1/", "Registry.Example:5000", "http://other.example/v2/"]
    file.write_text(
        json.dumps({"auths": {name: {"auth": basic("u", "p")} for name in names} | {"t.example": {"registrytoken": "T"}}})
    )
    auth = RegistryAuth(file)
    for host in (*HUB, "registry.example:5000", "other.example"):
        found = auth(host)
        assert found is not None, host
        assert (found.username, found.password) == ("u", "p")
    token = auth("t.example")
    assert token is not None
    assert token.token == "T"
    assert auth("unknown.example") is None
    assert "p" not in repr(auth.known["other.example"]).replace("password", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no file of credentials"),
        (json.dumps({"auths": {"a.example": {"auth": "S3CRET!"}}}), "auths.a.example.auth is no USER:PASSWORD"),
        (json.dumps({"auths": {"a.example": {"auth": base64.b64encode(b"S3CRET").decode()}}}), "no USER:PASSWORD"),
        (json.dumps({"auths": {"a.example": {"username": "S3CRET"}}}), "has no user and password"),
        (json.dumps({"auths": {"a.example": {}}}), "has no user and password"),
        (json.dumps({"credsStore": "desktop"}), "has no auths"),
    ],
)
def test_a_file_that_says_nothing_to_show_is_refused_by_name_and_quotes_no_secret(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "auth.json"
    file.write_text(text)
    with pytest.raises(Invalid, match=told) as caught:
        RegistryAuth(file)
    assert str(file) in caught.value.message
    assert "S3CRET" not in f"{caught.value.message}{caught.value.mend}"
    with pytest.raises(Invalid, match="No such file"):
        RegistryAuth(tmp_path / "other.json")


def test_an_entry_that_says_nothing_does_no_harm_to_the_others_and_none_at_all_are_none(tmp_path: Path) -> None:
    file = tmp_path / "auth.json"
    write(file, a_example={}, b_example={"auth": basic("u", ""), "identitytoken": "t"}, c_example={"auth": basic("u", "p")})
    with capture_logs() as logs:
        auth = RegistryAuth(file)
    assert set(auth.known) == {"c.example"}
    assert [entry["cause"].split("auths.")[1].split()[0] for entry in logs] == ["a.example", "b.example"]
    write(file)  # as after a logout
    assert auth("c.example") is None


def test_a_change_that_cannot_be_read_leaves_what_was_read_last_and_is_logged_once(tmp_path: Path) -> None:
    file = tmp_path / "auth.json"
    write(file, a_example={"auth": basic("u", "p")})
    auth = RegistryAuth(file)
    file.write_text("half of it")
    os.utime(file, ns=(1, 1))
    with capture_logs() as logs:
        assert [auth("a.example") is not None for _ in range(3)] == [True] * 3
    assert len(logs) == 1
    write(file, b_example={"auth": basic("u", "p")})
    assert auth("a.example") is None
    assert auth("b.example") is not None


def test_the_agent_of_an_atoll_up_gets_the_file(tmp_path: Path) -> None:
    file: Any = tmp_path / "auth.json"
    assert parse("agent", Config(registry_auth=file).arguments()).registry_auth == file
    assert parse("agent", Config().arguments()).registry_auth is None
