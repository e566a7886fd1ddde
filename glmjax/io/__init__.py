"""Doors to the file system and to what users write: paths, JSON, text, files that appear whole, locks."""
