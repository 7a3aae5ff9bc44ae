"""The evidential loss with gradient-weighted supervision of the uncertainty, in the same sweep."""
