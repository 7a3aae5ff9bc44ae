"""Code of the bundle."""
