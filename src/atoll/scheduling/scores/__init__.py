"""Wishes, one per file. Their weights make an order: regions as preferred, then spread, then packing."""

from atoll.scheduling.interface import DomainScore, Score
from atoll.scheduling.scores.packing import Packing
from atoll.scheduling.scores.regions import RegionOrder
from atoll.scheduling.scores.spread import SpreadOverNodes, SpreadOverPlaces

SCORES: tuple[Score, ...] = (RegionOrder(), SpreadOverNodes(), Packing())
DOMAIN_SCORE: DomainScore = SpreadOverPlaces()
