"""The model of a table, and other settings tried on it."""
