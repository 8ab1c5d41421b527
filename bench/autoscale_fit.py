"""The weights of `scheduling.forecast`, fitted by logistic regression to the minutes of the apps that are there to tune on."""

from __future__ import annotations

from typing import Any

import numpy as np

from atoll.scheduling.forecast import AGES, Forecast
from bench.autoscale_policies import EPOCH_MINUTE
from bench.autoscale_trace import DAY_MINUTES, App

RIDGE = 1.0
STEPS = 30


def fit(apps: list[App]) -> list[list[float]]:
    """Return a row of weights for each range of quiet minutes."""
    inputs: list[list[list[float]]] = [[] for _ in range(len(AGES) + 1)]
    answers: list[list[float]] = [[] for _ in range(len(AGES) + 1)]
    for app in apps:
        active = {minute for begin, end in app.busy for minute in range(int(begin // 60), int(end // 60) + 1)}
        forecast = Forecast()
        for minute in range(DAY_MINUTES):
            forecast.advance(EPOCH_MINUTE + minute)
            if forecast.seen:
                row, looks = forecast.inputs()
                inputs[row].append(looks)
                answers[row].append(float(minute in active))
            if minute in active:
                forecast.note(EPOCH_MINUTE + minute)
    return [_logistic(np.array(x), np.array(y)) for x, y in zip(inputs, answers, strict=True)]


def _logistic(x: Any, y: Any) -> list[float]:
    """Newton's method on the logarithmic loss with a ridge."""
    weights = np.zeros(x.shape[1])
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -15, 15)))
        curve = (x * (chance * (1 - chance) + 1e-6)[:, None]).T @ x + RIDGE * np.eye(x.shape[1])
        weights = weights + np.linalg.solve(curve, x.T @ (y - chance) - RIDGE * weights)
    return [round(float(weight), 3) for weight in weights]
