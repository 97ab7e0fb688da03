"""Faults and loads that only look like them, each with real traffic in three namespaces."""
