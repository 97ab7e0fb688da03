"""Loads: as packets, as traces of known shape, and real ones."""
