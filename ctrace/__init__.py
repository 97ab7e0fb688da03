"""ctrace finds what fills Linux's connection tracking table, and how to fix it safely."""

__version__ = "0.1.0"
