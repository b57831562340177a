"""Run by a peer's Python: load saved SAEs with SAELens, and write what they make of given activations.

    python encode_with_saelens.py INPUTS FOLDER SAE...

INPUTS holds a tensor `x` [rows, d_in]. For each SAE, FOLDER will have a file of its name with `features` [rows, d_sae]
and `reconstructions` [rows, d_in].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(inputs: str, outputs: str, *saes: str) -> None:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    x = load_file(inputs)["x"]
    for folder in map(Path, saes):
        sae = SAE.load_from_pretrained(str(folder), device="cpu")
        with torch.no_grad():
            features = sae.encode(x)
            reconstructions = sae.decode(features)
            assert torch.equal(sae(x), reconstructions)
        found = {"features": features.contiguous(), "reconstructions": reconstructions.contiguous()}
        save_file(found, Path(outputs) / f"{folder.name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
