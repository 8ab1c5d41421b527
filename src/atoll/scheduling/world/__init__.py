"""Where in the world replicas should be: near those who use them, under capacity, cost and hard rules. Pure.

    latency = round_trips_ms(users, sites)
    choice = choose(Problem(latency_ms=latency, demand=requests_per_s, room=room, count=8, replica_capacity=100.0))

docs/placement.md has the data's flow, the formulas and what was measured.
"""

from atoll.scheduling.world.choose import Choice, Problem, choose, preferred
from atoll.scheduling.world.rtt import Place, demo_places, distances_km, round_trips_ms

__all__ = ["Choice", "Place", "Problem", "choose", "demo_places", "distances_km", "preferred", "round_trips_ms"]
