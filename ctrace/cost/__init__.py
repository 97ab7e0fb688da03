"""What connection tracking costs this host: ``ctrace perf``."""
