"""Dirichlet measures of a voxel: expected probability, vacuity, entropies, dissonance."""
