"""What a run writes beside its checkpoints: config.json, metrics, the lock and the flight recorder."""
