"""Atoll from Python: the API's client, and the control-plane port over HTTP for agents and ingresses."""
