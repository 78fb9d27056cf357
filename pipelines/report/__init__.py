"""A run's report: the page, its tables and its figures."""
