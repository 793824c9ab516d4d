"""Encoders taken from well-kept libraries, with explicit key maps for their published files."""
