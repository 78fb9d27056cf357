"""Only the stage score: every head judges every image by every score."""

from __future__ import annotations

from jobs import stage_main

if __name__ == "__main__":
    stage_main("score", __doc__)
