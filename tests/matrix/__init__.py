"""Looks for counter-examples to "nothing is ever lost": turns that are killed, or go wrong, at every point of them."""
