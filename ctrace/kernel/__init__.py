"""What is asked of the kernel itself: BPF, BTF, its layout, rings, symbols."""
