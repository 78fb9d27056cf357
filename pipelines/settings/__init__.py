"""What the words of a run mean: its configuration, and what of it needs no plug-in."""
