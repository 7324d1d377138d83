"""Files to views: from images on disk or in a store to batches of source, target, action and masks.

sources (folder, shards, TFRecord, manifest) → files → samples (encoded, structure, bad) → loader (views, masks,
randomness) → graph (pipeline) → batch; clean for evaluation; synth, preview, verify, index and shards for the command
line. Nothing is imported here: DALI takes half a second.
"""
