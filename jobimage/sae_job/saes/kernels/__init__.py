"""Products that touch only active latents.

`sparse` has active latents and their products in public PyTorch operators, and the exact top-k; `selection` finds
active latents by a product in bfloat16; `triton_products` are the same products for CUDA devices; `choice` says
which of the two runs.
"""
