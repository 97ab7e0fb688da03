"""Text dumps, logs and support bundles, read as evidence and made into a recording."""
