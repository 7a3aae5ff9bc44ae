"""What the ops share: special functions, evidence activations, 3-tap filters, distributed sums."""
