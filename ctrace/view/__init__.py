"""Screens, reports and exports: they render a Snapshot and never fetch."""
