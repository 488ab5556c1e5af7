"""Generators that know the log-probability of what they draw."""
