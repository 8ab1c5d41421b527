"""What runs an instance on a node: one runtime per file, and the parts that runtimes share."""
