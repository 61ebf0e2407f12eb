"""Sources, transforms and the input pipeline: numpy and grain, no jax of our own."""
