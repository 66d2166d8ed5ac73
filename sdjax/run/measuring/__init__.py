"""What a model's answers come to: during a run, and by `sdjax evaluate`."""
