"""Data: composed scenes with exact labels, CSV lists of one's own pictures, and the readers below both."""
