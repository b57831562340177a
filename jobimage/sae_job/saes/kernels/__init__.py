"""Products that touch only active latents, in public PyTorch operators."""
