"""A small finished cache of made-up activations: sparse sums of a few directions, as SAEs like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import MANIFEST_KEY, POSITION, SEQUENCE, TOKEN_IDS, layout_of_part, shard_key
from sae_job.activations.manifest import CacheManifest, HookSums, PartEntry, ShardEntry
from sae_job.activations.statistics import merge_sums, sums_of
from sae_job.activations.writer import checksums
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import HookGroup

CONTEXT_SIZE = 8


def made_up_rows(rows: int, d_in: int, *, seed: int) -> torch.Tensor:
    """Rows [rows, d_in]: an offset and three of 4 * d_in directions each."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    chosen = torch.randint(4 * d_in, (rows, 3), generator=generator)
    strengths = 1 + torch.rand(rows, 3, 1, generator=generator)
    return 2 + (directions[chosen] * strengths).sum(dim=1)


def write_small_cache(
    store: ObjectStore,
    *,
    hooks: Sequence[str] = ("layer",),
    d_in: int | Mapping[str, int] = 6,
    shards: int = 4,
    contexts_per_shard: int = 24,
    dtype: torch.dtype = torch.float32,
    broken: Mapping[str, Sequence[tuple[int, int, float]]] | None = None,
) -> CacheManifest:
    """Write the shards and the manifest; a shard holds all positions of its contexts.

    Args:
        d_in: width of all hooks, or of each.
        broken: hook -> (shard, row, value): rows that hold this value, which neither checksums nor statistics tell.
    """
    widths = {hook: d_in if isinstance(d_in, int) else d_in[hook] for hook in hooks}
    rows = contexts_per_shard * CONTEXT_SIZE
    name = str(dtype).removeprefix("torch.")
    layout = layout_of_part(rows, widths, CODECS[name])
    values = {
        hook: made_up_rows(shards * rows, widths[hook], seed=number).to(dtype).split(rows)
        for number, hook in enumerate(hooks)
    }
    entries: list[ShardEntry] = []
    sums: dict[str, list[HookSums]] = {hook: [] for hook in hooks}
    for shard in range(shards):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(shard))
        buffer = bytearray(layout.size)
        buffer[: len(layout.header)] = layout.header
        view = memoryview(buffer)
        place = shard * rows + torch.arange(rows)
        layout.tensor(view, TOKEN_IDS).copy_((place % 50)[order])
        layout.tensor(view, SEQUENCE).copy_((place // CONTEXT_SIZE)[order])
        layout.tensor(view, POSITION).copy_((place % CONTEXT_SIZE)[order])
        for hook in hooks:
            stored = layout.tensor(view, hook)
            stored.copy_(values[hook][shard][order])
            sums[hook].append(sums_of(stored, hook))
            for of, row, value in (broken or {}).get(hook, ()):
                if of == shard:
                    stored[row, 0] = value
        key = shard_key(shard, rows, rows)
        store.put(key, buffer)
        sha256, crc32 = checksums(view, layout)
        entries.append(
            ShardEntry(
                rows=rows,
                start=shard * contexts_per_shard,
                stop=(shard + 1) * contexts_per_shard,
                parts=[PartEntry(key=key, bytes=len(buffer), sha256=sha256, crc32=crc32)],
            )
        )
    manifest = CacheManifest(
        format_version=1,
        identity="0123456789abcdef",
        spec={},
        model={"name": "made-up", "revision": None},
        dataset={"path": "made-up"},
        tokenizer={},
        seed=0,
        dtype=name,
        context_size=CONTEXT_SIZE,
        tokens=shards * rows,
        bytes=sum(part.bytes for entry in entries for part in entry.parts),
        rows_per_shard=rows,
        groups=[HookGroup(hooks=list(hooks))],
        hooks=[merge_sums(hook, sums[hook]) for hook in hooks],
        shards=entries,
        software=[],
        device=["cpu"],
    )
    store.put(MANIFEST_KEY, manifest.to_bytes())
    return manifest
