"""One file or folder per model, top to bottom: load, preprocess, predict, postprocess. None imports another."""
