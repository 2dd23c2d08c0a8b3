"""Media, audio, augmentation, the pipeline and the built-in dataset."""
