"""What texts tell of a host beside entries."""
