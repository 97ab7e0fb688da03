"""Counting by key: a slice of records to columns, and columns into tables of the heaviest keys."""
