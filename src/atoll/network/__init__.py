"""An instance's network: a namespace and a routed link each, out through NAT, in only to declared ports."""
