"""Volumes that are shown before their files have come: a piece is fetched when it is read, and verified before it is given."""
