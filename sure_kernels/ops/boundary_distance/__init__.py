"""Distance to the boundaries of a label map, and the bands that follow from it."""
