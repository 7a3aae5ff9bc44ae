"""The evidential loss: expected cross-entropy, KL of the wrong evidence, Dice."""
