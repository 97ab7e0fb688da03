"""What is in the tables, read beside the events: dumps, walks and samples."""
