"""The rules of common tools, in the structure that each gives them, around one container."""
