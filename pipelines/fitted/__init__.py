"""Scores that are fitted to training features: plan, fit, class statistics, mined words."""
