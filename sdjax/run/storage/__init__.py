"""A run's folder: checkpoints, their manifest and digests, on a disk or in a bucket."""
