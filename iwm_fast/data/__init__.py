"""Files to views: from a folder of images to batches of source, target, action and masks."""
