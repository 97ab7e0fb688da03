"""What records: a source to one file, or to a flight recorder's segments."""
