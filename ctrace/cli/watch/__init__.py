"""Verbs that watch this host."""
