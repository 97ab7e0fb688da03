"""Rules of nftables as text."""
