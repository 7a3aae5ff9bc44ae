"""One room per op: its reference, its closed form, its kernel and the autograd Function around them."""
