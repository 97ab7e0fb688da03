"""Lets the tests of this directory import its synthetic traffic."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
