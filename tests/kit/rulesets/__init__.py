"""Rule sets, the network they are tried in, and all that goes on there."""
