"""A namespace made again from texts, and read as a living one is."""
