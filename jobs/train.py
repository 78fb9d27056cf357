"""Only the stage train: train the networks of methods that train one, with Ray Train."""

from __future__ import annotations

from jobs import stage_main

if __name__ == "__main__":
    stage_main("train", __doc__)
