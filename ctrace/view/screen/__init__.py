"""The live screen and the plain frame."""
