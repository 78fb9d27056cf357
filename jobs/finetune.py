"""Only the stage finetune: train the chosen settings with Ray Train."""

from __future__ import annotations

from jobs import stage_main

if __name__ == "__main__":
    stage_main("finetune", __doc__)
