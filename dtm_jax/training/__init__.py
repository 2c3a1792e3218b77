"""What runs a training: mesh, optimiser, durations, pre-trained parameters, start-up."""
