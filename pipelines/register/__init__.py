"""The chosen detector becomes a version in MLflow's model registry."""
