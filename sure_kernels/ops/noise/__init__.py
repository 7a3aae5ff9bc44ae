"""The noise-uncertainty loss: more noise means more uncertainty near a boundary, and none far from it."""
