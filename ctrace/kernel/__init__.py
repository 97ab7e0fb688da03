"""Everything asked of the kernel itself: BPF, BTF, struct layouts, rings and symbols."""
