"""Energy-based out-of-distribution detection with vision-language models."""
