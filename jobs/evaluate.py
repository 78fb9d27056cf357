"""Only the stage evaluate: the table, the intervals and the report."""

from __future__ import annotations

from jobs import stage_main

if __name__ == "__main__":
    stage_main("evaluate", __doc__)
