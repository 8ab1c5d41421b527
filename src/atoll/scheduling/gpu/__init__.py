"""GPU packing: which node and which GPUs a pod goes to, so that as little GPU as can be is stranded.

`fleet` and `demand` hold the state and what is asked, `fragmentation` and `rollout` say what a node's free capacity
is worth, `policies` turns that into a choice. The kernels are compiled on first use: import this package only where
GPUs are placed. How the policies compare, and why, is in `docs/packing.md`.
"""
