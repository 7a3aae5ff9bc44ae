"""Pairwise ranking of one quantity against another: exact over all pairs, sampled as published, or by covariance."""
