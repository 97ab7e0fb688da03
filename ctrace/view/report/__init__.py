"""Reports: text, JSON and one page."""
