"""``python -m ctrace``."""

import os
import sys

if sys.path and sys.path[0] == os.getcwd():
    # -m looks in the current folder first: a file called click.py there, whoever wrote it,
    # would run as root. What belongs to this package is found beside this file.
    del sys.path[0]

from ctrace.cli import main

main()
