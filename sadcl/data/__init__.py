"""Data: composed scenes with exact labels, loaders for pictures in files, and the readers below both."""
