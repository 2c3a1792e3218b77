"""The vision transformer that is trained: model, config, weights."""
