"""Training frameworks: one small file each, imported only by who uses it."""
