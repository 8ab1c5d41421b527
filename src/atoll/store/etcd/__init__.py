"""The store on etcd, 3.4 or newer: one member, or a cluster of them that outlives the loss of a minority."""
