"""SAELens at work, in an environment of its own: caches activations, and reads cached ones for training.

    python saelens_worker.py caching MODEL CONTEXTS HOOK D_IN BATCH_SIZE
    python saelens_worker.py reading ACTIVATIONS DATASET BATCH_SIZE ROWS
    python saelens_worker.py text MODEL TEXT TOKENS CONTEXT_SIZE

It reads one request a line and answers with one line of JSON. CONTEXTS is a safetensors file with `contexts` (token ids
[contexts, context_size]), ACTIVATIONS one with `rows` [contexts, context_size, d_in], DATASET a new folder for them as
the library caches them, BATCH_SIZE contexts per forward pass, ROWS rows per training batch.

    caching: `cache FOLDER`    caches all contexts into a new folder; answered with the CPU seconds that it took
             `export PATH`     writes what was cached last to PATH: `rows` [contexts, context_size, d_in]
    reading: `batches N`       takes N batches; answered with the CPU seconds that they took
             `export PATH`     writes the next batch to PATH: `rows` [batch, d_in]
    text:    `raw`, `tokens`   takes all contexts of the folder TEXT of JSON lines, or of TOKENS of parquet files with
                               token ids; answered with the CPU seconds that they took
             `raw PATH`, …     also writes them to PATH: `contexts` [contexts, context_size]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Caching:
    """The library's runner for caching, in float32."""

    def __init__(self, model: str, contexts: str, hook: str, d_in: str, batch_size: str) -> None:
        from datasets import Dataset
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig  # pyright: ignore[reportMissingImports]

        tokens = load_file(contexts)["contexts"]
        config = CacheActivationsRunnerConfig(
            dataset_path="given",
            model_name=model,
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            model_batch_size=int(batch_size),
            hook_name=hook,
            d_in=int(d_in),
            training_tokens=tokens.numel(),
            context_size=tokens.shape[1],
            # One buffer of all tokens; half a token more, so that rounding takes none away.
            buffer_size_gb=(tokens.numel() + 0.5) * int(d_in) * 4 / 1e9,
            new_cached_activations_path="given",
            dtype="float32",
            device="cpu",
            streaming=False,
        )
        self._hook = hook
        self._runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"tokens": tokens.tolist()}))
        self._cached: Any = None

    def answer(self, command: str, argument: str) -> dict[str, Any]:
        if command == "export":
            rows = self._cached.with_format("torch")[:][self._hook]
            save_file({"rows": rows.contiguous()}, argument)
            return {"written": argument}
        self._runner.cfg.new_cached_activations_path = argument
        start = time.process_time()
        self._cached = self._runner.run()
        return {"cpu_seconds": time.process_time() - start}


class Reading:
    """The library's store of activations over a cached dataset, in float32, with the library's size of buffer."""

    def __init__(self, activations: str, dataset: str, batch_size: str, rows: str) -> None:
        from datasets import Array2D, Dataset, Features, Sequence, Value
        from sae_lens import ActivationsStore  # pyright: ignore[reportMissingImports]

        cached = load_file(activations)["rows"]
        contexts, context_size, d_in = cached.shape
        token_ids = torch.zeros(contexts, context_size, dtype=torch.int32)
        features = Features(
            {
                "hook": Array2D(shape=(context_size, d_in), dtype="float32"),
                "token_ids": Sequence(Value(dtype="int32"), length=context_size),
            }
        )
        Dataset.from_dict({"hook": cached, "token_ids": token_ids}, features=features).save_to_disk(dataset)
        self._store = ActivationsStore(
            # Neither is used where activations are cached, but a dataset must be there.
            model=None,
            dataset=Dataset.from_dict({"tokens": token_ids[:1].tolist()}),
            streaming=False,
            hook_name="hook",
            hook_layer=0,
            hook_head_index=None,
            context_size=context_size,
            d_in=d_in,
            n_batches_in_buffer=20,
            total_training_tokens=1,
            store_batch_size_prompts=int(batch_size),
            train_batch_size_tokens=int(rows),
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=dataset,
        )

    def answer(self, command: str, argument: str) -> dict[str, Any]:
        if command == "export":
            save_file({"rows": self._batch().contiguous()}, argument)
            return {"written": argument}
        rows = 0
        start = time.process_time()
        for _ in range(int(argument)):
            rows += len(self._batch())
        return {"cpu_seconds": time.process_time() - start, "rows": rows}

    def _batch(self) -> Tensor:
        return self._store.next_batch().flatten(1)


class Text:
    """The library's store of activations as the source of token ids, a context at a time; no activations are made."""

    def __init__(self, model: str, text: str, tokens: str, context_size: str) -> None:
        from datasets import load_dataset
        from sae_lens.load_model import load_model  # pyright: ignore[reportMissingImports]

        files = {"raw": ("json", f"{text}/*.jsonl"), "tokens": ("parquet", f"{tokens}/*.parquet")}
        self._context_size = int(context_size)
        self._model = load_model("AutoModelForCausalLM", model, device="cpu")
        self._datasets = {
            name: load_dataset(reader, data_files={"train": pattern}, split="train")
            for name, (reader, pattern) in files.items()
        }

    def answer(self, command: str, argument: str) -> dict[str, Any]:
        store = self._open(command)
        contexts: list[Tensor] = []
        start = time.process_time()
        while True:
            try:
                contexts.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
            except StopIteration:
                break
        used = time.process_time() - start
        if argument:
            save_file({"contexts": torch.cat(contexts)}, argument)
        return {"cpu_seconds": used, "contexts": len(contexts)}

    def _open(self, name: str) -> Any:
        from sae_lens import ActivationsStore  # pyright: ignore[reportMissingImports]

        return ActivationsStore(
            model=self._model,
            dataset=self._datasets[name],
            streaming=False,
            hook_name="hook",
            hook_layer=0,
            hook_head_index=None,
            context_size=self._context_size,
            d_in=1,
            n_batches_in_buffer=2,
            total_training_tokens=1,
            store_batch_size_prompts=1,
            train_batch_size_tokens=self._context_size,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )


def main(kind: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    # Libraries print as they please; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = {"caching": Caching, "reading": Reading, "text": Text}[kind](*arguments)
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        print(json.dumps(side.answer(command, argument)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
