"""GPUs: who gets which devices, and as little of them stranded as can be.

What every plan uses, in plain Python and numpy: `devices` (what a node has, what is taken), `asks` (what will do), `choose` (which
ones), `mig` (where partitions go), `usable` (what is lost to the next), `states` and `inventory` (once for equal nodes), `words`.
`grants` is the same for one node alone; `mig_measure` says how good MIG placement is.

The packer apart, for research and `bench packing`: `fleet` and `demand` hold the state and what is asked, `fragmentation` and
`rollout` say what a node's free capacity is worth, `policies` and `packer` turn that into a choice. Its kernels are compiled on
first use. How the policies compare, and why, is in `docs/packing.md`.
"""
