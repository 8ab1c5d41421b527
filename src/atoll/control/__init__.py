"""What the leader does: apps and jobs become instances, instances get nodes, nodes are watched, old records go.

Each resource has a file with a pure `decide…`: records in, actions out. `loop` runs them level-triggered: it compares what is
wanted with what is seen and writes the difference, so that a lost event costs time and never correctness.
"""
