"""What the project measures of itself: each suite compares with a reference in the same run."""
