"""`placement.constraints`: hard rules on a node's labels. All must hold."""

from __future__ import annotations

import numpy as np

from atoll.model.spec import Constraint
from atoll.scheduling.constraints import holds, in_words, problem
from atoll.scheduling.demand import Demand
from atoll.scheduling.interface import Reason, View
from atoll.scheduling.snapshot import ABSENT, Bools, Ints


class LabelRules:
    name = "constraint"

    def wants(self, demand: Demand) -> bool:
        return bool(demand.placement.constraints)

    def passes(self, view: View, demand: Demand) -> Bools:
        mask: Bools = np.ones(view.size, dtype=np.bool_)
        for constraint in demand.placement.constraints:
            mask &= self._one(view, constraint)
        return mask

    def explain(self, view: View, demand: Demand, failed: Ints) -> Reason:
        for constraint in demand.placement.constraints:
            wrong = problem(constraint)
            if wrong is not None:
                return Reason(f"constraint {in_words(constraint)}: {wrong.message}", wrong.mend)
        worst, count = demand.placement.constraints[0], -1
        for constraint in demand.placement.constraints:
            turned = int((~self._one(view, constraint)[failed]).sum())
            if turned > count:
                worst, count = constraint, turned
        values = sorted(
            {
                self_labels.get(worst.label, "")
                for self_labels in (view.nodes.nodes[view.nodes.names[row]].labels for row in failed[:1000].tolist())
            }
            - {""}
        )
        there = f"values of {worst.label!r} there: {', '.join(values[:10])}" if values else ""
        mend = there or f"label a node with it: atoll nodes label NODE {worst.label}=VALUE"
        return Reason(f"not satisfying {in_words(worst)}", mend)

    def _one(self, view: View, constraint: Constraint) -> Bools:
        ids = [id for value, id in view.nodes.values(constraint.label).items() if holds(constraint, value)]
        if holds(constraint, None):
            ids.append(ABSENT)
        return np.isin(view.nodes.label(constraint.label), ids)
