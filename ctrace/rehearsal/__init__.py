"""A rehearsal: packets of a service through a copy of the host's firewall, without and with us."""
