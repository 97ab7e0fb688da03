"""A plan applied on trial, kept, watched and undone."""
