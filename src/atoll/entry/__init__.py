"""The processes, and the only place beside the simulator that chooses implementations."""
