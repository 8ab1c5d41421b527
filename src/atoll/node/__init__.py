"""The agent: it owns what runs on its node, keeps it running with or without the control plane, and says what it sees."""
