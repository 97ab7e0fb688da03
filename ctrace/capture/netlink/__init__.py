"""Capture without BPF: the events of ctnetlink and the kernel's own counters."""
