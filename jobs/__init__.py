"""One command per stage: words -> config -> Ray -> stage -> one line."""
