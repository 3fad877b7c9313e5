"""Fleets: how they are set, how many workers they want, and where those come from."""
