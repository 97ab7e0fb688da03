"""Applying a plan on trial, keeping it, watching it and undoing it."""
