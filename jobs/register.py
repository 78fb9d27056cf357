"""Only the stage register: put the chosen model and its threshold into the registry."""

from __future__ import annotations

from jobs import stage_main

if __name__ == "__main__":
    stage_main("register", __doc__)
