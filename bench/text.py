"""What contexts cost from text and from token ids that were made before, beside SAELens.

    pretokenized_vs_raw       our tokens per CPU second from pre-tokenized data over those from text
    raw_vs_saelens            ours from text over those of SAELens
    pretokenized_vs_saelens   ours from pre-tokenized data over those of SAELens

Ours are tokenized, packed, checked, shuffled and stored as blocks, as the step `prepare` does it. SAELens gives batches
of tokens and stores none. All four sides give the same contexts, which is checked first.

    python bench/text.py [--quick]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.peers import SAE_LENS_REFERENCE, peer_environment
from bench.worker import Worker
from sae_job.models.load import inspect_model
from sae_job.steps.prepare_contexts import block_builder
from sae_job.steps.pretokenize import Pretokenization, StoreOutput, pretokenize_documents
from sae_job.storage.file_store import FileStore
from sae_job.text.blocks import read_block, shuffled_order
from sae_job.text.documents import open_documents
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_operator.api.activation_cache import (
    ActivationCacheSpec,
    CacheStorage,
    DatasetSource,
    Hook,
    ModelSource,
    Separators,
)
from tests.caches import step_context
from tests.testbed.data import ensure_english_text, ensure_small_model

CONTEXT_SIZE = 128
HOOK = "model.layers.0"


class Ours:
    """The contexts of a data set, as `prepare` makes them."""

    def __init__(self, model: str, dataset: Path, directory: Path) -> None:
        self._spec = ActivationCacheSpec(
            model=ModelSource(name=model),
            dataset=DatasetSource(path=os.fspath(dataset)),
            hooks=[Hook(name=HOOK)],
            context_size=CONTEXT_SIZE,
            tokens=CONTEXT_SIZE,
            storage=CacheStorage(uri=directory.as_uri()),
        )
        self._facts = inspect_model(self._spec.model, [HOOK])
        self._store = FileStore(directory)
        self._blocks: list[str] = []

    def store(self) -> float:
        """Store all blocks; returns tokens per CPU second."""
        builder = block_builder(self._spec, self._facts, [], step_context())
        self._blocks, contexts = [], 0
        start = time.process_time()
        while (record := builder.write_next(self._store)) is not None:
            self._blocks.append(record.sha256)
            contexts += record.contexts
        return contexts * CONTEXT_SIZE / (time.process_time() - start)

    def contexts(self) -> torch.Tensor:
        """What was stored last, in the order of the data set: [contexts, context_size]."""
        blocks = []
        for number, sha256 in enumerate(self._blocks):
            block = read_block(self._store, number, sha256=sha256)
            blocks.append(block[torch.from_numpy(shuffled_order(self._spec.seed, number, len(block))).argsort()])
        return torch.cat(blocks)


def pretokenized(model: str, text: Path, directory: Path) -> Path:
    """The text as token ids, in its order."""
    source = DatasetSource(path=os.fspath(text))
    wanted = Pretokenization(
        tokenizer_name=model,
        dataset=source,
        context_size=CONTEXT_SIZE,
        separators=Separators(begin_context="bos", between_documents="bos"),
        shuffle=False,
    )
    tokenizer = TextTokenizer(load_tokenizer(ModelSource(name=model)))
    pretokenize_documents(wanted, open_documents(source), tokenizer, [StoreOutput(FileStore(directory))])
    return directory


def repeated(text: Path, directory: Path, times: int) -> Path:
    """The text several times over."""
    directory.mkdir()
    for number in range(times):
        for file in sorted(text.glob("*.jsonl")):
            (directory / f"{number:03d}-{file.name}").write_bytes(file.read_bytes())
    return directory


def readable_by_peer(model: str, directory: Path) -> Path:
    """The model with a tokenizer class that the peer's release of Transformers knows, too."""
    directory.mkdir()
    for file in Path(model).iterdir():
        (directory / file.name).symlink_to(file)
    config = directory / "tokenizer_config.json"
    content = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.unlink()
    config.write_text(json.dumps(content))
    return directory


def compare(directory: Path, *, times: int, turns: int) -> dict[str, float]:
    """Medians of the ratios, turn by turn.

    Raises:
        RuntimeError: two sides gave different contexts.
    """
    model = os.fspath(ensure_small_model())
    text = repeated(ensure_english_text(), directory / "text", times)
    tokens = pretokenized(model, text, directory / "tokens")
    sides = {"raw": Ours(model, text, directory / "raw"), "tokens": Ours(model, tokens, directory / "from-tokens")}
    environment = peer_environment() | {"HF_DATASETS_CACHE": os.fspath(directory / "peer-cache")}
    peer_model = readable_by_peer(model, directory / "peer-model")
    arguments = ["text", os.fspath(peer_model), os.fspath(text), os.fspath(tokens / "data"), str(CONTEXT_SIZE)]
    peer = SAE_LENS_REFERENCE
    with Worker(peer.name, peer.python(), "saelens_worker.py", arguments, environment) as theirs:
        theirs.answer()
        found = {}
        for name, side in sides.items():
            side.store()
            found[f"ours, {name}"] = side.contexts().to(torch.int64)
            theirs.ask(f"{name} {directory / name}.safetensors")
            found[f"{peer.name}, {name}"] = load_file(directory / f"{name}.safetensors")["contexts"]
        expected = found["ours, raw"]
        for name, contexts in found.items():
            print(f"  {name}: {len(contexts)} contexts of {CONTEXT_SIZE}")
            if not torch.equal(contexts, expected):
                raise RuntimeError(f"{name}: contexts differ from ours, raw: costs cannot be compared")
        rates: dict[str, list[float]] = {name: [] for name in ("raw", "tokens", "their raw", "their tokens")}
        for _ in range(turns):
            for name, side in sides.items():
                rates[name].append(side.store())
                rates[f"their {name}"].append(expected.numel() / theirs.ask(name)["cpu_seconds"])
    for name, values in rates.items():
        print(f"  {name}: " + ", ".join(f"{value:,.0f}" for value in values) + " tokens per CPU second")

    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))

    return {
        "pretokenized_vs_raw": ratio("tokens", "raw"),
        "raw_vs_saelens": ratio("raw", "their raw"),
        "pretokenized_vs_saelens": ratio("tokens", "their tokens"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less text, fewer turns")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        ratios = compare(Path(scratch), times=1 if quick else 4, turns=3 if quick else 7)
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
