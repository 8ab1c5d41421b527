"""`atoll certificates` against an API in memory: keys come from files, and stand nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.entry.config import Config
from atoll.entry.process import parse
from atoll.model.certificates import CertificateView
from atoll.model.errors import Invalid
from atoll.model.records.certificate import CertificatePhase, CertificateSource
from atoll.sdk.fake import FakeApi
from made_certificates import Maker


class Atoll:
    def __init__(self, directory: Path) -> None:
        self.api = FakeApi()
        self.directory = directory
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
        self.environment["COLUMNS"] = "200"

    def run(self, *arguments: str, code: int = 0) -> Result:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, ["certificates", *arguments], obj=session, env=self.environment, catch_exceptions=False)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def file(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    return Atoll(tmp_path)


def test_a_certificate_is_added_from_files_listed_shown_and_removed(atoll: Atoll) -> None:
    chain, key = Maker().sign("www.test")
    cert, private = atoll.file("c.pem", chain), atoll.file("k.pem", key)
    assert "CN=fake" in atoll.run("add", "WWW.test", "--cert", cert, "--key", private).stderr
    secret = key.splitlines()[1]
    assert [path for method, path, _ in atoll.api.requests if method == "PUT"] == ["/v1/projects/default/certificates/www.test"]
    for result in (atoll.run("list"), atoll.run("show", "www.test"), atoll.run("show", "www.test", "--json")):
        assert "www.test" in result.stdout + result.stderr
        assert secret not in result.stdout + result.stderr
    assert atoll.run("show", "www.test", "--chain").stdout == chain
    assert "pass --yes" in atoll.run("remove", "www.test", code=2).stderr
    assert atoll.json("remove", "www.test", "--yes") == {"removed": "www.test"}
    assert atoll.json("list") == []


def test_what_is_not_given_right_is_said_before_anything_is_sent(atoll: Atoll) -> None:
    cert = atoll.file("c.pem", "x")
    (atoll.directory / "der").write_bytes(b"\x30\x82\xff")
    for arguments, code, words in (
        (("add", "a.test"), 2, "--cert and --key"),
        (("add", "a.test", "--cert", cert), 2, "go together"),
        (("add", "a.test", "--own", "--acme"), 2, "--own"),
        (("add", "a.test", "--cert", cert, "--key", cert, "--own"), 2, "--own"),
        (("add", "a.test", "--cert", cert + "x", "--key", cert), 4, "there is no"),
        (("add", "a.test", "--cert", str(atoll.directory / "der"), "--key", cert), 2, "is not PEM"),
        (("acme", "--contact", "a@b.test"), 2, "of which authority"),
    ):
        assert words in atoll.run(*arguments, code=code).stderr
    assert atoll.api.requests == []


def test_the_state_of_what_is_signed_and_its_last_error_are_shown(atoll: Atoll) -> None:
    atoll.run("add", "own.test", "--own")
    assert "own" in atoll.run("list").stdout
    view = CertificateView(
        host="acme.test",
        project="default",
        source=CertificateSource.ACME,
        state=CertificatePhase.FAILED,
        app="web",
        error="the CA says no",
        retry_at=1_800_000_000.0,
    )
    atoll.api.put("certificates", "default/acme.test", view)
    text = atoll.run("show", "acme.test").stderr
    assert "failed" in text
    assert "the CA says no" in text
    assert "2027-01-15" in text
    assert "app web" in text
    assert "the CA says no" in atoll.run("list").stdout


def test_the_root_and_the_acme_authority_are_shown_and_chosen(atoll: Atoll) -> None:
    assert atoll.run("ca").stdout == "root\n"
    assert "no ACME authority" in atoll.run("acme").stderr
    key = atoll.file("eab", "c2VjcmV0\n")
    text = atoll.run(
        "acme", "--directory", "https://ca.test/dir", "--contact", "o@a.test", "--eab-kid", "k", "--eab-key-file", key
    ).stderr
    assert "https://ca.test/dir, contact o@a.test" in text
    assert "c2VjcmV0" not in text
    assert atoll.json("acme")["eab_kid"] == "k"
    assert "no ACME authority" in atoll.run("acme", "--forget").stderr


@pytest.mark.parametrize(
    ("ingress", "given", "port"),
    [
        ("0.0.0.0:80", "", 443),
        ("127.0.0.1:8080", "", 8443),
        ("127.0.0.1:65500", "", None),
        ("127.0.0.1:8080", "off", None),
        ("127.0.0.1:8080", "9443", 9443),
    ],
)
def test_the_port_for_tls_is_beside_the_plain_one_unless_it_is_said(ingress: str, given: str, port: int | None) -> None:
    config = parse("ingress", Config(ingress=ingress, ingress_tls_port=given).arguments())
    assert config.tls_port == port
    assert bool(config.ingress_tls_port) == bool(given)


@pytest.mark.parametrize("given", ["0", "8080", "on", "70000"])
def test_a_port_for_tls_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(Invalid, match="ingress-tls-port"):
        _ = Config(ingress_tls_port=given).tls_port


@pytest.mark.parametrize("host", ["https://www.test", "www.test/x", "www.test:443", "a_b.test", "10.0.0.1", ""])
@pytest.mark.parametrize("words", [("add", "--own"), ("show",), ("remove", "--yes")])
def test_what_is_no_hostname_is_refused_before_anything_is_asked(atoll: Atoll, host: str, words: tuple[str, ...]) -> None:
    said = atoll.run(words[0], host, *words[1:], code=2).stderr
    assert "is not a hostname" in said
    assert ("without scheme" in said) == bool({"/", ":"} & set(host))
    assert atoll.api.requests == []
