"""Which nodes are silent: beats by datagram, probes straight and through others, and a brake for when many fall silent at once."""
