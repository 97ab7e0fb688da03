"""Proof on this host, by real traffic, that the records say what was sent."""
