"""Products that touch only active latents.

`sparse` has active latents and their products in public PyTorch operators, and the exact top-k; `selection` finds
active latents by a product in bfloat16; `triton_products` are the same products for CUDA devices, and `triton_top_k`
is a top-k for them; `triton_driver` lets them run without a compiler; `choice` says which runs.
"""
