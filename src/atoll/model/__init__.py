"""Frozen records, units, states and legal transitions, errors, ports: the vocabulary that every layer shares."""
