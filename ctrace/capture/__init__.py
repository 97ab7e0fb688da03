"""Sources of batches: BPF in three hook families, and netlink."""
