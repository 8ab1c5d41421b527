"""Near whom instances are wished for, how far they may be, and which countries hold them."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

from msgspec import Struct

from atoll.model.errors import Invalid
from atoll.model.names import NAME_PATTERN

if TYPE_CHECKING:
    from atoll.model.spec.workload import Workload

LATENCY_MAX_S = 10.0
"""The largest bound; beyond it there is nothing to bound."""
ANY = "any"
"""Among `placement.regions`: every region that is not listed."""
SITE_PATTERN = r"[a-zA-Z0-9](?:[-._a-zA-Z0-9]{0,61}[a-zA-Z0-9])?"
_NUMBER = r"[-+]?[0-9]{1,3}(?:\.[0-9]{1,9})?"
_POINT = re.compile(rf"({_NUMBER}) *, *({_NUMBER})")
_SITE = re.compile(SITE_PATTERN)
_NAME = re.compile(NAME_PATTERN)
_MEND = "write 'users', 'app:NAME', 'site:NAME' or coordinates such as '52.37,4.90'"

_EU = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
EU = frozenset(_EU.split())
AREAS: dict[str, frozenset[str]] = {"eu": EU, "eea": EU | {"IS", "LI", "NO"}}
"""Groups of countries that `placement.residency` knows by name: the European Union, and its Economic Area."""
_COUNTRIES = (
    "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA "
    "CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA "
    "GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP "
    "KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS "
    "MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS "
    "RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW "
    "TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW"
)
COUNTRIES = frozenset(_COUNTRIES.split())
"""Two-letter codes of ISO 3166-1, and XK, which is in use for Kosovo."""


class NearKind(enum.StrEnum):
    USERS = "users"
    APP = "app"
    SITE = "site"
    POINT = "point"


class Near(Struct, frozen=True):
    """What `placement.near` says, taken apart."""

    kind: NearKind
    name: str = ""
    """Of the app or job, or of the site."""
    latitude: float = 0.0
    longitude: float = 0.0


def near_of(text: str) -> Near:
    """Return what `placement.near` means. Raises Invalid."""
    field = "placement.near"
    if text == NearKind.USERS:
        return Near(NearKind.USERS)
    kind, _, name = text.partition(":")
    if kind == NearKind.APP and _NAME.fullmatch(name):
        return Near(NearKind.APP, name)
    if kind == NearKind.SITE and _SITE.fullmatch(name):
        return Near(NearKind.SITE, name)
    point = _POINT.fullmatch(text)
    if point is None:
        raise Invalid(f"{field}: {text[:60]!r} is near nothing that is known", field=field, mend=_MEND)
    latitude, longitude = float(point[1]), float(point[2])
    if abs(latitude) > 90 or abs(longitude) > 180:
        raise Invalid(f"{field}: {text!r} lies nowhere on earth", field=field, mend="latitude first, -90 to 90, then longitude")
    return Near(NearKind.POINT, latitude=latitude, longitude=longitude)


def check_locality(spec: Workload) -> None:
    """Raise Invalid for wishes about places that contradict themselves."""
    placement = spec.placement
    for index, name in enumerate(placement.residency):
        _check_residency(f"placement.residency[{index}]", name)
    if placement.near is None:
        if placement.latency_max is not None:
            raise Invalid(
                "placement.latency_max: bounds the way to what placement.near names, and that is not set",
                field="placement.latency_max",
                mend="set near, for example near = 'users'",
            )
        return
    near = near_of(placement.near)
    if near.kind is NearKind.USERS and not getattr(spec, "ports", ()):
        raise Invalid(
            "placement.near: nobody sends requests to what has no port, so that it has no users",
            field="placement.near",
            mend="use 'app:NAME', 'site:NAME' or coordinates, or give the app a port",
        )
    if near.kind is NearKind.USERS and placement.spread != "node":
        raise Invalid(
            "placement.near: 'users' says how many instances each site gets, and so does placement.spread",
            field="placement.near",
            mend="leave one of the two out",
        )
    if near.kind is NearKind.APP and near.name == spec.name:
        raise Invalid("placement.near: an app is not near itself", field="placement.near", mend="use placement.together")
    if placement.latency_max is not None and not 0 < placement.latency_max <= LATENCY_MAX_S:
        raise Invalid(
            f"placement.latency_max: from 1ms to {LATENCY_MAX_S:g}s, got {float(placement.latency_max):g}s",
            field="placement.latency_max",
            mend="write for example '50ms'",
        )


def _check_residency(field: str, name: str) -> None:
    if not name or len(name) > 63:
        raise Invalid(f"{field}: a country's code or a region's name has 1 to 63 characters", field=field)
    if name in AREAS:
        return
    if len(name) == 2 and name.isascii() and name.isalpha() and name.upper() == name and name not in COUNTRIES:
        raise Invalid(f"{field}: {name} is no country's code", field=field, mend="use the two letters of ISO 3166-1, such as DE")
    if name.upper() in COUNTRIES and name not in COUNTRIES:
        mend = f"write {name.upper()} for the country; a region of that name needs a constraint on the label 'region'"
        raise Invalid(f"{field}: {name!r} may be a country or a region", field=field, mend=mend)
