"""Sparse autoencoders: one file per architecture, found through the table in `architectures`.

`config` is cfg.json; `base` the SAE for use, with saving and loading; `trainable` the interface to a trainer;
`initialization` how weights begin; `auxk` the loss that revives dead latents; `kernels/` the sparse products.
"""
