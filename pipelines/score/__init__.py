"""Every head judges every image by every score: scores by name, judge, post-hoc search."""
