"""Where each instance runs: a columnar snapshot of the nodes, filters, scores, and the pure `plan` over them.

Nothing in here does I/O, reads a clock or draws a random number: the same snapshot and the same pending instances always
give the same plan. A new rule is one new file in `filters/` or `scores/` and one line in its list.
"""
