"""The vision transformer that is trained: student, classifier and segmenter on one trunk; their weights."""
