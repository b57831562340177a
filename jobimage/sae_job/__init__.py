"""The steps that pods run: activations to object storage, and sparse autoencoders from them."""
