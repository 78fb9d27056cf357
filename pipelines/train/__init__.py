"""Images in, trained networks out."""
