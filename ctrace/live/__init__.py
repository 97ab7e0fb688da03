"""Feeds for a screen: live capture or replay, through the model."""
