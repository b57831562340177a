"""Evaluation: how well an SAE reconstructs held-out activations, and what that costs the language model."""
