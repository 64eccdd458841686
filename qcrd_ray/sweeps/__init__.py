"""Sweeps: many runs over a space of configs and seeds, by Ray Tune, and what they say together."""
