"""The whole of Atoll but for its runtimes, network and disks, in one process on a virtual clock, with faults from a seed.

`python -m atoll.sim --seeds 200` runs seeds 0 to 199; `--seed N` runs one again, step for step, and tells its story.
"""
