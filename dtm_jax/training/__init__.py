"""What runs a training: records of a run, its lock, its recorder of the last good steps."""
