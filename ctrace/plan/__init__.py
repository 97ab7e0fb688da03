"""The plan that advice proposes and apply takes: checked fields, never rule text."""
