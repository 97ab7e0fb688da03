"""The packet filter of a namespace: reading it, judging it, and writing our own rules."""
