"""Where to put noise: hard voxels, and patches around them that do not overlap."""
