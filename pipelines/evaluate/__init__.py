"""Scores in, evidence out: figures, intervals, best settings against defaults."""
