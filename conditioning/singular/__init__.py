"""Singular values of linear and convolutional layers: of the kernel, on a circle, as they run."""
