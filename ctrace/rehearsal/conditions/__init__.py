"""Conditions that a copy loads otherwise, and what packets leave behind."""
