"""GPUs of this machine: what there is, how it fares, how it is shared, and how an instance gets exactly what it was given."""
