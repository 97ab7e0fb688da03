"""Verbs that make and read recordings."""
