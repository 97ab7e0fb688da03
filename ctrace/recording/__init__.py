"""The recording: format, writer and reader."""
