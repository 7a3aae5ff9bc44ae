"""The 3-tap filters behind every gradient operator: names, taps, and what lies beyond the border."""

OPERATORS = ("sobel", "scharr", "central")
PADDING_MODES = ("replicate", "reflect", "zeros", "extrapolate")
CHANNEL_REDUCTIONS = ("l2", "max", "mean")

# Smoothing taps (side, centre, side) across the other axes, normalised to sum to 1.
SMOOTHING = {"sobel": (0.25, 0.5), "scharr": (3 / 16, 10 / 16), "central": (0.0, 1.0)}
