"""A Kubernetes operator for jobs that cache activations and train sparse autoencoders."""

__version__ = "0.1.0"
