"""The fixtures of a toy sweep."""

from tests.sweep.toy import backbone, sets, tune_by

__all__ = ["backbone", "sets", "tune_by"]
