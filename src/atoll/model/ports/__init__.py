"""The edges of the pure core: each port is one Protocol, with a public fake beside its real implementations.

`store` · `clock` · `runtime` · `images` · `network` · `control_plane`
"""
