"""Recordings: the format, what writes and reads them, and what is done with whole ones."""
