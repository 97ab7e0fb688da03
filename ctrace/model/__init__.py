"""Arithmetic on batches, giving snapshots, in bounded memory."""
