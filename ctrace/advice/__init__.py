"""Hazards, rules, predictions; apply and undo."""
