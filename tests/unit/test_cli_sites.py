"""`atoll sites` and what plans say of round trips, against an API in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.records import Capacity, Ingress, Node
from atoll.model.spec import RuntimeName
from atoll.model.views import IngressView
from atoll.sdk.fake import FakeApi

SHARED = Path(__file__).parents[3] / "shared" / "data"
APP = """
name = "web"
image = "registry.example/web:1"
[[ports]]
port = 80
[scale]
replicas = 3
[placement]
near = "users"
"""


class Atoll:
    def __init__(self, directory: Path) -> None:
        self.api = FakeApi()
        self.directory = directory
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
        self.environment["COLUMNS"] = "200"

    def run(self, *arguments: str, code: int = 0) -> Result:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, list(arguments), obj=session, env=self.environment, catch_exceptions=False)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def node(self, name: str, site: str) -> None:
        capacity = Capacity(cpu_milli=4000, memory_bytes=8 << 30, disk_bytes=100 << 30)
        self.api.put("nodes", name, Node(name=name, site=site, capacity=capacity, runtimes=(RuntimeName.RUNC,)))


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    return Atoll(tmp_path)


def test_a_site_is_described_bit_by_bit_shown_and_removed(atoll: Atoll) -> None:
    atoll.node("n1", "ams")
    assert "ams" in atoll.run("sites", "list").stdout, "nodes name it"
    atoll.run("sites", "set", "ams", "--at", "52.31,4.76", "--country", "NL")
    atoll.run("sites", "set", "ams", "--region", "weur", "--rtt", "bare=7.5ms")
    atoll.run("sites", "set", "fra", "--at", "50.03,8.57")
    shown = atoll.json("sites", "show", "ams")
    assert shown["site"]["country"] == "NL"
    assert shown["site"]["region"] == "weur"
    assert shown["site"]["round_trips_ms"] == {"bare": 7.5}
    assert 7 < shown["round_trips_ms"]["fra"] < 10
    words = atoll.run("sites", "show", "ams")
    assert "region weur, country NL, at 52.31,4.76" in words.stderr
    assert "fra" in words.stdout
    atoll.run("sites", "remove", "fra")
    assert [view["site"]["name"] for view in atoll.json("sites", "list")] == ["ams"]
    atoll.run("sites", "show", "fra", code=4)


@pytest.mark.parametrize("bad", [("--at", "here"), ("--at", "site:ams"), ("--at", "99,0"), ("--rtt", "fra"), ("--rtt", "fra=soon")])
def test_a_place_that_cannot_be_read_is_refused_with_a_mend(atoll: Atoll, bad: tuple[str, str]) -> None:
    said = atoll.run("sites", "set", "ams", *bad, code=2).stderr
    assert "mend:" in said
    assert not atoll.api.under("sites")


def test_sites_and_round_trips_are_imported_and_the_same_again_changes_nothing(atoll: Atoll, tmp_path: Path) -> None:
    sites, trips = tmp_path / "sites.csv", tmp_path / "rtt.csv"
    sites.write_text("name,lat,lng,cca2,region\nams,52.31,4.76,NL,weur\nbare,,,,\n")
    trips.write_text("source,destination,min_ms,avg_ms\nams,ams,0.1,0.2\nams,bare,8,9.5\nnew,ams,3,4\n")
    assert atoll.json("sites", "import", str(sites), "--rtt", str(trips)) == {"read": 3, "changed": ["ams", "bare", "new"]}
    records = {site.name: site for site, _ in atoll.api.under("sites")}
    assert (records["ams"].latitude, records["ams"].country, records["ams"].round_trips_ms) == (52.31, "NL", {"bare": 9.5})
    assert records["bare"].latitude is None
    assert records["new"].round_trips_ms == {"ams": 4.0}
    assert atoll.json("sites", "import", str(sites), "--rtt", str(trips))["changed"] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,latitude\n,1\n", "row 1: name is missing"),
        ("name,latitude\na,north\n", "row 1: latitude is 'north'"),
        ("name\na\na\n", "row 2: a is there twice"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(atoll: Atoll, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "sites.csv").write_text(text)
    assert words in atoll.run("sites", "import", str(tmp_path / "sites.csv"), code=2).stderr


def test_the_list_of_a_content_network_and_the_matrix_of_a_cloud_are_taken(atoll: Atoll) -> None:
    places, matrix = (
        SHARED / "pops_cloudflare" / "cloudflare-iata-full.json",
        SHARED / "rtt_cloud_regions" / "aws_19x19_2020-06-05.csv",
    )
    if not places.exists() or not matrix.exists():
        pytest.skip("the shared data are not here")
    done = atoll.json("sites", "import", str(places), "--rtt", str(matrix))
    assert done["read"] == 352 + 19
    assert atoll.json("sites", "show", "eu-west-1")["round_trips_ms"]["us-east-1"] == pytest.approx(67.0, abs=5)


def test_a_plan_shows_where_instances_near_their_users_go_and_how_far_each_candidate_is(atoll: Atoll, tmp_path: Path) -> None:
    for site, at in (("ams", "52.31,4.76"), ("iad", "38.94,-77.46"), ("sin", "1.36,103.99")):
        atoll.node(f"n-{site}", site)
        atoll.run("sites", "set", site, "--at", at)
    for site in ("ams", "sin"):
        atoll.api.put("ingresses", site, Ingress(name=site, site=site, http_port=80))
    (tmp_path / "atoll.toml").write_text(APP)
    said = atoll.run("plan", str(tmp_path))
    assert "near its users: ams 2, sin 1" in said.stderr
    assert "ROUND TRIP" in said.stdout
    data = atoll.json("plan", str(tmp_path))
    assert data["placed"] == {"n-ams": 2, "n-sin": 1}
    assert {one["site"] for one in data["explanation"]["candidates"]} == {"ams", "iad", "sin"}
    assert all(one["latency_ms"] > 0 for one in data["explanation"]["candidates"])
    (tmp_path / "atoll.toml").write_text(APP + 'residency = ["eu"]\n')
    refused = atoll.run("plan", str(tmp_path), code=1)
    assert "no-residency" in refused.stderr
    assert "atoll sites set ams --country CODE" in refused.stderr


def test_ingresses_are_listed_with_when_they_were_heard_of_and_one_is_forgotten(tmp_path: Path) -> None:
    atoll = Atoll(tmp_path)
    for name, silent_s in (("edge-1", 3.0), ("edge-2", None)):
        ingress = Ingress(name=name, site="ams", http_port=80, address="192.0.2.1")
        atoll.api.ingress_views[name] = IngressView(ingress=ingress, silent_s=silent_s, requests_per_s=2.5, problems=1)
    text = atoll.run("ingresses").stdout
    assert "3 s ago" in text
    assert "192.0.2.1:80" in text
    assert [view["ingress"]["name"] for view in atoll.json("ingresses")] == ["edge-1", "edge-2"]
    assert "forgotten" in atoll.run("ingresses", "forget", "edge-2").stderr
    assert atoll.json("ingresses", "forget", "edge-1")["ingress"]["name"] == "edge-1"
    assert atoll.json("ingresses") == []
    assert "no ingress 'edge-1'" in atoll.run("ingresses", "forget", "edge-1", code=4).stderr
