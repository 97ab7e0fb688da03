"""Verbs about this host's abilities and about ctrace itself."""
