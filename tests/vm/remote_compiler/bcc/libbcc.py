"""Marks this package as BCC, as the real one does by its binding of that name."""
