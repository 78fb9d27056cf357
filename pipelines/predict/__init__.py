"""A registered model judges images."""
