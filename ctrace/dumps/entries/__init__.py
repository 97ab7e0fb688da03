"""Entries of tables and events, in every form that tools print them."""
