"""NVIDIA's devices, through its management library (NVML) in processes of its own.

The agent's side is in `hardware` (the port), `channel` (a worker and its deadlines), `watch` (events), `records` (answers to
records and errors) and `presence` (what the machine shows without the library). The worker's side is in `worker` (the
protocol), `reading`, `partitioning` and `waiting`; it imports nothing else of Atoll, so that it starts in milliseconds.
`fake_driver` and `fake_nvml` stand in for the driver and the library in tests.
"""
