"""``python -m ctrace``."""

from ctrace.cli import main

main()
