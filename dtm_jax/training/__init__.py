"""Run a training: the mesh, the sharded step, its batches, the optimiser, durations and the start-up."""
