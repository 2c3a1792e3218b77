"""Files that a user names: paths, buckets, and the faults of the place where a run writes."""
