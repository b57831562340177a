"""Run by a peer's Python: what SAELens makes of given activations, with SAEs that are given and with its own.

    python encode_with_saelens.py INPUTS FOLDER SAE...

INPUTS holds a tensor `x` [rows, d_in]. For each SAE, FOLDER/given will have a file of its name with `features`
[rows, d_sae] and `reconstructions` [rows, d_out]. FOLDER/made will have SAEs of SAELens's own, each in a folder, and
beside it such a file; those whose names begin with `refused` have none. FOLDER/refused.json tells which of the given
SAEs could not be loaded, and why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from make_with_saelens import make_all
from safetensors.torch import load_file, save_file

HEADS = 4


def main(inputs: str, outputs: str, *saes: str) -> None:
    import sae_lens  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    x = load_file(inputs)["x"]
    given, made = Path(outputs) / "given", Path(outputs) / "made"
    given.mkdir()
    made.mkdir()
    refused: dict[str, str] = {}
    for folder in map(Path, saes):
        try:
            # Weights in fewer bits are the same in float32, and so are products then.
            sae = sae_lens.SAE.load_from_pretrained(str(folder), device="cpu", dtype="float32")
        except Exception as error:  # noqa: BLE001
            refused[folder.name] = repr(error)
        else:
            save_file(results(sae, x), given / f"{folder.name}.safetensors")
    (Path(outputs) / "refused.json").write_text(json.dumps(refused))

    newest = not sae_lens.__version__.startswith("5.")
    for name, sae in make_all(made, newest=newest).items():
        if not name.startswith("refused"):
            used = sae_lens.SAE.load_from_pretrained(str(made / name)) if sae is None else sae
            save_file(results(used, x), made / f"{name}.safetensors")


def results(sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    if sae.hook_z_reshaping_mode:
        x = x.view(len(x), HEADS, -1)
    with torch.no_grad():
        features = sae.encode(x)
        reconstructions = sae(x)
    return {"features": features.contiguous(), "reconstructions": reconstructions.reshape(len(x), -1).contiguous()}


if __name__ == "__main__":
    main(*sys.argv[1:])
