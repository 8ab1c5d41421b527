"""Where sites are: what is measured comes first, then what operators know, then the distance."""

from __future__ import annotations

import csv
import math
from importlib import resources
from pathlib import Path

import msgspec
import pytest

from atoll.model.errors import Invalid
from atoll.model.records import IngressHeartbeat, RoundTrips, Site
from atoll.model.spec import AppSpec, JobSpec, Near, NearKind, Placement, Port, check_app, check_job, near_of
from atoll.model.units import Seconds
from atoll.scheduling.geography import LOCAL_MS, UNKNOWN, Geography
from atoll.scheduling.whereabouts import Whereabouts, traffic_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
AMS = Site(name="ams", country="NL", region="weur", latitude=52.31, longitude=4.76)
FRA = Site(name="fra", country="DE", region="weur", latitude=50.03, longitude=8.57)
SFO = Site(name="sfo", country="US", region="wnam", latitude=37.62, longitude=-122.38)


def test_a_distance_is_estimated_until_something_better_is_known() -> None:
    estimated = Geography([AMS, SFO]).round_trips_ms(["ams"], ["sfo"])[0, 0]
    assert 120 < estimated < 160  # 8,800 km
    told = Site(name="ams", round_trips_ms={"sfo": 140.0})
    assert Geography([told, SFO]).round_trips_ms(["sfo"], ["ams"])[0, 0] == 140.0
    measured = [RoundTrips(ingress="i", site="sfo", ms={"ams": 150.0}, at=0.0)]
    assert Geography([told, SFO], measured).round_trips_ms(["ams"], ["sfo"])[0, 0] == 150.0


def test_two_measurements_of_a_pair_count_by_their_mean() -> None:
    measured = [
        RoundTrips(ingress="i", site="sfo", ms={"ams": 150.0}, at=0.0),
        RoundTrips(ingress="j", site="ams", ms={"sfo": 130.0}, at=0.0),
    ]
    both = Geography([], measured).round_trips_ms(["ams", "sfo"], ["ams", "sfo"])
    assert both.tolist() == [[LOCAL_MS, 140.0], [140.0, LOCAL_MS]]


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_a_round_trip_that_cannot_be_is_not_believed(ms: float) -> None:
    geography = Geography([AMS, FRA], [RoundTrips(ingress="i", site="ams", ms={"fra": ms}, at=0.0)])
    assert 5 < geography.round_trips_ms(["ams"], ["fra"])[0, 0] < 12


def test_a_site_that_nobody_has_described_is_near_itself_only() -> None:
    geography = Geography([AMS])
    assert geography.round_trips_ms(["ams", "x"], ["x", "y"]).tolist() == [[UNKNOWN, UNKNOWN], [LOCAL_MS, UNKNOWN]]
    assert Geography().round_trips_ms(["local"], ["local"])[0, 0] == LOCAL_MS
    assert geography.from_point_ms(52.31, 4.76, ["ams", "x"]).tolist() == [3.0, UNKNOWN]


def test_the_measured_matrix_of_a_cloud_is_taken_over_as_it_is() -> None:
    path = SHARED / "rtt_cloud_regions" / "gcp_20x20_2020.csv"
    if path.exists():
        rows = [(row["source"], row["destination"], float(row["avg_ms"])) for row in csv.DictReader(path.open())]
    else:  # the copy in the package has the same figures
        text = resources.files("atoll.scheduling.world").joinpath("data", "rtt.json").read_text(encoding="utf-8")
        network = msgspec.json.decode(text)["networks"][0]
        names = [name for name, *_ in network["regions"]]
        rows = [(a, b, network["avg_ms"][i][j]) for i, a in enumerate(names) for j, b in enumerate(names)]
    trips: dict[str, dict[str, float]] = {}
    for source, target, ms in rows:
        if source != target:
            trips.setdefault(source, {})[target] = ms
    geography = Geography([], [RoundTrips(ingress=name, site=name, ms=row, at=0.0) for name, row in trips.items()])
    names = sorted(trips)
    ms = geography.round_trips_ms(names, names)
    assert len(names) == 20
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i != j:
                assert ms[i, j] == pytest.approx((trips[a][b] + trips[b][a]) / 2)


def test_where_requests_come_from_is_every_entrance_alike_until_some_are_counted() -> None:
    whereabouts = Whereabouts()
    assert whereabouts.users("app/p/a").sites == ()
    whereabouts.entrances = ("b", "a")
    assert (whereabouts.users("app/p/a").sites, whereabouts.users("app/p/a").known) == (("a", "b"), False)
    beats = [
        IngressHeartbeat(ingress="i", site="a", at=0.0, requests={"p/a": 3.0, "p/b": 9.0}),
        IngressHeartbeat(ingress="j", site="a", at=0.0, requests={"p/a": 3.0}),
        IngressHeartbeat(ingress="k", site="c", at=0.0, requests={"p/a": 2.0}),
    ]
    whereabouts.traffic = traffic_of(beats, {"p/a"})
    users = whereabouts.users("app/p/a")
    assert (users.sites, users.shares.tolist(), users.known) == (("a", "c"), [0.75, 0.25], True)
    assert whereabouts.users("app/p/b").known is False
    assert set(traffic_of(beats)) == {"app/p/a", "app/p/b"}


def test_what_near_means_is_read_once() -> None:
    assert near_of("users") == Near(NearKind.USERS)
    assert near_of("app:db") == Near(NearKind.APP, "db")
    assert near_of("site:ams-1.core") == Near(NearKind.SITE, "ams-1.core")
    assert near_of("52.37, -4.9") == Near(NearKind.POINT, latitude=52.37, longitude=-4.9)


def app(ports: bool = True, **placement: object) -> AppSpec:
    where = Placement(**placement)  # type: ignore[arg-type]
    return AppSpec(name="web", image="r.example/a:1", ports=(Port(port=80),) if ports else (), placement=where)


@pytest.mark.parametrize(
    ("placement", "field", "words"),
    [
        ({"near": "user"}, "placement.near", "near nothing that is known"),
        ({"near": "app:Web"}, "placement.near", "near nothing"),
        ({"near": "site:"}, "placement.near", "near nothing"),
        ({"near": "91,0"}, "placement.near", "nowhere on earth"),
        ({"near": "app:web"}, "placement.near", "not near itself"),
        ({"near": "users", "spread": "site"}, "placement.near", "leave one"),
        ({"latency_max": Seconds(0.05)}, "placement.latency_max", "set near"),
        ({"near": "users", "latency_max": Seconds(0)}, "placement.latency_max", "50ms"),
        ({"near": "users", "latency_max": Seconds(11)}, "placement.latency_max", "10s"),
        ({"residency": ("ZZ",)}, "placement.residency[0]", "ISO 3166-1"),
        ({"residency": ("eu", "de")}, "placement.residency[1]", "write DE"),
        ({"residency": ("",)}, "placement.residency[0]", "1 to 63"),
    ],
)
def test_a_wish_about_places_that_cannot_be_meant_is_refused_with_its_field(
    placement: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(Invalid) as refused:
        check_app(app(**placement))
    assert refused.value.field == field
    assert words in f"{refused.value.message} {refused.value.mend}"


def test_what_has_no_port_has_no_users() -> None:
    with pytest.raises(Invalid, match="no port"):
        check_app(app(ports=False, near="users"))
    with pytest.raises(Invalid, match="no port"):
        check_job(JobSpec(name="j", image="r.example/a:1", placement=Placement(near="users")))
    check_job(JobSpec(name="j", image="r.example/a:1", placement=Placement(near="app:db", latency_max=Seconds(0.05))))
    check_app(app(near="users", latency_max=Seconds(0.05), residency=("eu", "CH", "weur")))
