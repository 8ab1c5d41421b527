"""GPU nodes as columns: what is free, per GPU, and what every node has in total."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from atoll.model.errors import Invalid

Ints = NDArray[np.int64]

GPU_MILLI = 1000
"""A whole GPU."""

MODELS_MAX = 62
"""Names of GPU models in one fleet: a pod's choice among them is one bit each in a 64-bit word."""

ANY_MODEL = (1 << MODELS_MAX) - 1


class Nodes(NamedTuple):
    """The columns that the kernels read and write; row = node. Units: thousandths of a core or GPU, and MiB."""

    cpu_milli: Ints
    memory_mib: Ints
    gpu_milli: Ints
    """(nodes, most GPUs of any node); 0 where a node has no such GPU."""
    gpus: Ints
    model: Ints
    cpu_total_milli: Ints
    tenants: Ints
    """(nodes, 1 + most GPUs): how many pods hold a part of a GPU [0], or n whole ones [n]."""
    version: Ints
    """Counts a node's changes, so that cached scores know when they are stale."""


@dataclass(frozen=True)
class Fleet:
    names: tuple[str, ...]
    models: tuple[str, ...]
    nodes: Nodes

    @property
    def total_gpu_milli(self) -> int:
        return int(self.nodes.gpus.sum()) * GPU_MILLI

    @property
    def used_gpu_milli(self) -> int:
        return self.total_gpu_milli - int(self.nodes.gpu_milli.sum())

    def copy(self) -> Fleet:
        """Return the same state in columns of its own."""
        return Fleet(self.names, self.models, Nodes(*(column.copy() for column in self.nodes)))

    def mask(self, spec: str) -> int:
        """Return the set of models that `spec` (`A|B`, or nothing for any) allows, as bits; unknown names match no node."""
        named = [name for name in spec.split("|") if name]
        if not named:
            return ANY_MODEL
        return sum(1 << self.models.index(name) for name in set(named) if name in self.models)


def build_fleet(rows: Iterable[tuple[str, int, int, int, str]]) -> Fleet:
    """Make an empty fleet from `(name, cpu_milli, memory_mib, gpus, model)` in order of name.

    Raises Invalid: a figure is negative, a name is there twice, there is no node, or there are too many models.
    """
    rows = sorted(rows)
    names = tuple(row[0] for row in rows)
    if not rows or len(set(names)) != len(names):
        raise Invalid("a fleet needs at least one node, and every node a name of its own")
    if any(min(row[1:4]) < 0 for row in rows):
        raise Invalid("a node has less than nothing of something")
    models = tuple(sorted({row[4] for row in rows}))
    if len(models) > MODELS_MAX:
        raise Invalid(f"{len(models)} GPU models: the most is {MODELS_MAX}")
    most = max(1, max(row[3] for row in rows))
    gpus = np.array([row[3] for row in rows], dtype=np.int64)
    cpu_milli = np.array([row[1] for row in rows], dtype=np.int64)
    return Fleet(
        names,
        models,
        Nodes(
            cpu_milli=cpu_milli,
            memory_mib=np.array([row[2] for row in rows], dtype=np.int64),
            gpu_milli=np.where(np.arange(most)[None, :] < gpus[:, None], GPU_MILLI, 0).astype(np.int64),
            gpus=gpus,
            model=np.array([models.index(row[4]) for row in rows], dtype=np.int64),
            cpu_total_milli=cpu_milli.copy(),
            tenants=np.zeros((len(rows), most + 1), dtype=np.int64),
            version=np.zeros(len(rows), dtype=np.int64),
        ),
    )


def read_fleet(file: TextIO) -> Fleet:
    """Read an openb node list (`sn,cpu_milli,memory_mib,gpu,model`); nodes without a GPU are left out.

    Raises Invalid: a column is missing or no number.
    """
    rows = (
        (row["sn"], integer(row, "cpu_milli"), integer(row, "memory_mib"), integer(row, "gpu"), row["model"])
        for row in read_rows(file, "sn")
    )
    return build_fleet(row for row in rows if row[3] > 0)


def read_rows(file: TextIO, key: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file that has a column `key`."""
    reader = csv.DictReader(file)
    if key not in (reader.fieldnames or ()):
        raise Invalid(f"the list has no column {key!r}: is it of the openb format?")
    return list(reader)


def integer(row: Mapping[str, str | None], column: str) -> int:
    """Return a whole number that is at least 0 and fits the kernels."""
    try:
        value = int(row.get(column) or "")
    except ValueError as error:
        raise Invalid(f"{column} is no whole number: {row.get(column)!r}") from error
    if not 0 <= value < 1 << 40:
        raise Invalid(f"{column} is out of range: {value}")
    return value
