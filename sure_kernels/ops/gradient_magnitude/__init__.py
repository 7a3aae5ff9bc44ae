"""Gradient magnitude of an image: Sobel, Scharr and central differences in 2D and 3D."""
