"""Ways of packets through the rules of a stage, and where an accept belongs by them."""
