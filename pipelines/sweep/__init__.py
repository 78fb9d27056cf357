"""Settings chosen on validation data: search space, trials, Ray Tune, evidence."""
