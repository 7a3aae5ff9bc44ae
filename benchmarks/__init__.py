"""Time and memory of the losses against what a user would pick instead."""
