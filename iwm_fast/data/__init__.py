"""Files to views: from a folder of images to batches of source, target, action and masks.

files → samples (encoded, structure, bad) → loader (views, masks, randomness) → graph (pipeline) → batch; clean for
evaluation, synth, preview and verify for the command line. Nothing is imported here: DALI takes half a second.
"""
