"""Files of weights: find them, read their tensors, and convert the names of the tensors."""
