"""The packet filter of a namespace: read, judged, and our own rules written."""
