"""Recordings: the format, reading and writing it, and tools for whole recordings."""
