"""The training loop and what surrounds it: gradients, checkpoints, evaluation, watching, sinks."""
