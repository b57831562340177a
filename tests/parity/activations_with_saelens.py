"""Run by a peer's Python: read and write data sets of cached activations with SAELens.

    python activations_with_saelens.py read FOLDER HOOK OUTPUT
    python activations_with_saelens.py write INPUT HOOK FOLDER

`read` takes all contexts of a data set as training does, and writes them to OUTPUT: `activations` [rows, d_in] and
`token_ids` [rows]. `write` makes a data set, in two shards that are then joined, of INPUT's `activations` [contexts,
positions, d_in] and `token_ids` [contexts, positions].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read(folder: str, hook: str, output: str) -> None:
    from datasets import Dataset, load_from_disk
    from sae_lens.training.activations_store import ActivationsStore  # pyright: ignore[reportMissingImports]

    there = load_from_disk(folder)
    assert isinstance(there, Dataset)
    positions, d_in = there.features[hook].shape
    contexts = len(there)
    store = ActivationsStore(
        model=torch.nn.Identity(),
        dataset=Dataset.from_dict({"tokens": [[0] * positions] * contexts}),
        streaming=False,
        hook_name=hook,
        hook_layer=0,
        hook_head_index=None,
        context_size=positions,
        d_in=d_in,
        n_batches_in_buffer=2,
        total_training_tokens=contexts,
        store_batch_size_prompts=contexts,
        train_batch_size_tokens=positions,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=folder,
    )
    activations, token_ids = store.get_buffer(1, shuffle=False)
    save_file({"activations": activations[:, 0].contiguous(), "token_ids": token_ids.contiguous()}, output)


def write(source: str, hook: str, folder: str) -> None:
    from datasets import Array2D, Dataset, Features, Sequence, Value
    from sae_lens.cache_activations_runner import (  # pyright: ignore[reportMissingImports]
        CacheActivationsRunner,
    )

    found = load_file(source)
    contexts, positions, d_in = found["activations"].shape
    features = Features(
        {
            hook: Array2D(shape=(positions, d_in), dtype="float32"),
            "token_ids": Sequence(Value(dtype="int32"), length=positions),
        }
    )
    shards = Path(folder) / ".tmp_shards"
    shards.mkdir(parents=True)
    for number, part in enumerate(torch.arange(contexts).chunk(2)):
        columns = {hook: found["activations"][part], "token_ids": found["token_ids"][part]}
        Dataset.from_dict(columns, features=features).save_to_disk(f"{shards}/shard_{number:05d}", num_shards=1)
    CacheActivationsRunner._consolidate_shards(shards, Path(folder), copy_files=False)


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
