"""Histograms of probabilities and of uncertainty: one pass, from which calibration and error detection follow."""
