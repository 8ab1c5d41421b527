"""Atoll: many machines, in many places, one computer."""

__version__ = "0.1.0"
