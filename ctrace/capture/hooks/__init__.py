"""BPF at hooks: conntrack's functions (fentry, kprobe), or links around its own hooks."""
