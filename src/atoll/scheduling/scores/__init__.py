"""Wishes, one per file. Their weights make an order: regions as preferred, spread over places, off tainted nodes, GPUs, spread over
nodes, packing."""

from atoll.scheduling.interface import DomainScore, GroupScore, Score
from atoll.scheduling.scores.affinity import Near
from atoll.scheduling.scores.cost import Cheap
from atoll.scheduling.scores.gpu import KeepsGpusWhole, SparesGpus
from atoll.scheduling.scores.images import ImagesThere
from atoll.scheduling.scores.near import Close
from atoll.scheduling.scores.packing import Packing
from atoll.scheduling.scores.regions import RegionOrder
from atoll.scheduling.scores.spread import SpreadOverNodes, SpreadOverPlaces
from atoll.scheduling.scores.taints import ShunsTainted

SCORES: tuple[Score, ...] = (RegionOrder(), ShunsTainted(), SparesGpus(), KeepsGpusWhole(), SpreadOverNodes(), Packing())
GROUP_SCORES: tuple[GroupScore, ...] = (Close(), Near(), Cheap(), ImagesThere())
DOMAIN_SCORE: DomainScore = SpreadOverPlaces()
