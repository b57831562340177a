"""Sparse autoencoders, in training and for use.

In training: one file per architecture, found through the table in `architectures`; `trainable` is the interface to a
trainer, `weights` what architectures share, `initialization` how weights begin. `sparse_step` is the step of those that
select their latents, `batch_selection` the selection over a whole batch, `auxk` the loss that revives dead latents;
`penalized` has what those with a sparsity penalty share; `kernels/` has the sparse products.

For use: `base` is the SAE, `encoders` has each architecture's own part in one table, `folding` the changes of weights
that leave reconstructions as they are, `hook_points` the places to read and replace what passes. `config` is what an
SAE computes, `saelens5` and `saelens6` translate that from and to cfg.json, and `files` reads and writes the folder.
"""
