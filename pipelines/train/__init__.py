"""Image classifiers trained from pixels: decoded images on disk, augmentation."""
