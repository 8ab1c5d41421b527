"""Images: references, registries, the node's content-addressed store, and building without Docker."""
