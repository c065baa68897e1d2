"""Exported models: files that run without this package, and the description in them of all that a picture needs."""
