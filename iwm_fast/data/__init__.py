"""From images on disk or in an object store to batches of source, target, action and masks.

sources (folder, shards, TFRecord, manifest) → files → samples (encoded, structure, bad_samples) → loader (views, masks,
randomness) → graph (pipeline) → batch; eval_images for evaluation; tools for the command line. Nothing is imported
here: DALI takes half a second.
"""
