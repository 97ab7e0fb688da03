"""Verbs that propose a change, put it into force and take it back."""
