"""Sites, as operators describe them, with what is known of them beside that."""

from __future__ import annotations

import re
from collections import Counter

from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.ingress_heartbeats import ROUND_TRIP_MS_MAX, IngressHeartbeats
from atoll.model import codec, keys
from atoll.model.errors import Invalid, NotFound
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Ingress, Node, RoundTrips, Site
from atoll.model.spec import ANY, AREAS, COUNTRIES, SITE_PATTERN
from atoll.model.views import Page, SiteView
from atoll.scheduling.geography import Geography

SITES_MAX = 2_000
"""Sites with a record, and round trips that one names."""
WORDS_MAX = 1_024
_SITE = re.compile(SITE_PATTERN)


class Sites:
    def __init__(self, context: Context, ingresses: IngressHeartbeats) -> None:
        self._context = context
        self._state = context.state
        self._ingresses = ingresses

    def all(self, *, limit: int, after: str = "") -> Page[SiteView]:
        """Return every site that has a record, a node or an ingress, by name."""
        nodes, ingresses = self._nodes(), self._by_site()
        names = sorted({*self._state.records(Site), *nodes, *ingresses})
        names = [name for name in names if name > after]
        geography = self._geography()
        items = tuple(self._view(name, nodes, ingresses, geography) for name in names[:limit])
        return Page(items=items, revision=self._state.revision, next=names[limit - 1] if len(names) > limit else None)

    def get(self, name: str) -> SiteView:
        """Return one site, with the round trips to all others that are known or estimated. Raises NotFound."""
        nodes, ingresses = self._nodes(), self._by_site()
        if name not in self._state.records(Site) and name not in nodes and name not in ingresses:
            raise NotFound(f"no site '{name[:60]}'", mend="'atoll sites' lists them; 'atoll sites set' describes one")
        return self._view(name, nodes, ingresses, self._geography(), everything=True)

    async def put(self, site: Site, *, request: RequestKey | None = None) -> SiteView:
        """Describe a site; what is not said is not known. Safe to repeat. Raises Invalid."""
        check_site(site)

        def build() -> Draft[SiteView]:
            held = self._state.get(Site, site.name)
            if held is None and len(self._state.records(Site)) >= SITES_MAX:
                raise Invalid(f"there are {SITES_MAX} sites already", mend="remove those that are not used")
            if held is not None and held.record == site:
                return Draft(answer=lambda _: self.get(site.name))
            key = keys.site(site.name)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(site))],
                answer=lambda revision: SiteView(site=site, revision=revision),
            )

        await self._context.write(SiteView, build, request)
        return self.get(site.name)

    async def remove(self, name: str, *, request: RequestKey | None = None) -> Site:
        """Forget where a site is; its nodes stay. Raises NotFound."""

        def build() -> Draft[Site]:
            held = self._state.get(Site, name)
            if held is None:
                raise NotFound(f"nobody has described site '{name[:60]}'")
            key, record = keys.site(name), held.record
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: record)

        return await self._context.write(Site, build, request)

    def _nodes(self) -> Counter[str]:
        return Counter(held.record.site for held in self._state.records(Node).values())

    def _by_site(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, held in sorted(self._state.records(Ingress).items()):
            found.setdefault(held.record.site, []).append(name)
        return found

    def _geography(self) -> Geography:
        return Geography(
            (held.record for held in self._state.records(Site).values()),
            (held.record for held in self._state.records(RoundTrips).values()),
        )

    def _view(
        self,
        name: str,
        nodes: Counter[str],
        ingresses: dict[str, list[str]],
        geography: Geography,
        *,
        everything: bool = False,
    ) -> SiteView:
        held = self._state.get(Site, name)
        beats = self._ingresses.all()
        here = [beats[one] for one in ingresses.get(name, ()) if one in beats]
        measured: dict[str, float] = {}
        for ingress in ingresses.get(name, ()):
            told = self._state.get(RoundTrips, ingress)
            if told is not None and told.record.site == name:
                measured.update(told.record.ms)
        others = sorted({*geography.sites, *measured} - {name}) if everything else []
        ms = geography.round_trips_ms([name], others)[0] if others else ()
        return SiteView(
            site=held.record if held is not None else Site(name=name),
            described=held is not None,
            nodes=nodes[name],
            ingresses=tuple(ingresses.get(name, ())),
            requests_per_s=round(sum(sum(beat.requests.values()) for beat in here), 3),
            measured_ms=dict(sorted(measured.items())),
            round_trips_ms={other: round(float(one), 3) for other, one in zip(others, ms, strict=True) if one < ROUND_TRIP_MS_MAX},
            revision=held.revision if held is not None else 0,
        )


def check_site(site: Site) -> None:
    """Raise Invalid for a site that is nowhere, or is no site."""
    if _SITE.fullmatch(site.name) is None:
        raise Invalid(
            f"name: {site.name[:60]!r} is no site's name", field="name", mend="letters, digits, '-', '.' and '_', at most 63"
        )
    if site.country and site.country not in COUNTRIES:
        mend = "two capital letters of ISO 3166-1, such as DE"
        raise Invalid(f"country: {site.country[:20]!r} is no country's code", field="country", mend=mend)
    if site.region in AREAS or site.region == ANY or site.region in COUNTRIES or len(site.region) > 63:
        raise Invalid(f"region: {site.region[:60]!r} cannot be a region's name", field="region", mend="for example 'weur'")
    if (site.latitude is None) != (site.longitude is None):
        raise Invalid("latitude and longitude: both or neither", field="latitude")
    for field, value, most in (("latitude", site.latitude, 90.0), ("longitude", site.longitude, 180.0)):
        if value is not None and not -most <= value <= most:
            raise Invalid(f"{field}: from -{most:g} to {most:g} degrees, got {value}", field=field)
    if len(site.note) > WORDS_MAX:
        raise Invalid(f"note: at most {WORDS_MAX} characters", field="note")
    if len(site.round_trips_ms) > SITES_MAX:
        raise Invalid(f"round_trips_ms: at most {SITES_MAX} sites", field="round_trips_ms")
    for other, ms in site.round_trips_ms.items():
        if _SITE.fullmatch(other) is None or not 0 < ms <= ROUND_TRIP_MS_MAX:
            raise Invalid(
                f"round_trips_ms: {other[:60]!r} = {ms}: a site's name, and above 0 up to {ROUND_TRIP_MS_MAX:g} ms",
                field="round_trips_ms",
            )
