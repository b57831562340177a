"""Which groups of hooks a cache has: those that it has, and one more for hooks that are asked for anew."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sae_job.activations.manifest import CacheManifest
from sae_job.text.plan import CacheIndex, HookGroup, row_bytes, rows_per_shard
from sae_operator.api.activation_cache import ActivationCacheSpec


@dataclass(frozen=True)
class CacheShape:
    """Hooks and rows of a cache that is planned.

    Attributes:
        groups: hooks, in the order in which they come to the cache.
        d_in: width of each hook.
        rows_per_shard: fixed when a cache is begun.
        tokens: rows.
    """

    groups: list[HookGroup]
    d_in: dict[str, int]
    rows_per_shard: int
    tokens: int

    def row_bytes(self, dtype: str, *, first_group: int = 0) -> int:
        """Bytes of a row in all parts, of this group and later ones."""
        return sum(
            row_bytes({hook: self.d_in[hook] for hook in group.hooks}, dtype, number)
            for number, group in enumerate(self.groups)
            if number >= first_group
        )

    def missing_row_bytes(self, dtype: str, finished: CacheManifest | None) -> int:
        """Bytes of a row in the parts of one shard that are written together, beside those of a finished cache."""
        return self.row_bytes(dtype, first_group=self._first_missing(finished))

    def missing_hooks(self, finished: CacheManifest | None) -> list[str]:
        """Hooks of these parts: a worker computes all of them at once."""
        return [hook for group in self.groups[self._first_missing(finished) :] for hook in group.hooks]

    def _first_missing(self, finished: CacheManifest | None) -> int:
        return 0 if finished is None or finished.tokens < self.tokens else len(finished.groups)


def shape_of(
    spec: ActivationCacheSpec,
    d_in: dict[str, int],
    earlier: CacheIndex | None,
    manifest: CacheManifest | None,
    *,
    proved: Collection[int] = (),
) -> CacheShape:
    """The shape of the cache that a spec asks for, in a folder where one may have been begun.

    A finished cache keeps its groups, and its rows when it has more. Of one without a manifest the first groups stay
    that are written to the end, for other resources have them (the manifest may have been deleted, to be written
    again), or whose hooks are all asked for: what else was begun is dropped, so that hooks that cannot be cached do not
    stay in the way. New hooks become one group. When nothing stays the cache begins anew.

    Args:
        spec: what is asked for.
        d_in: width of each hook of the spec.
        earlier: the plan that is stored.
        manifest: the finished cache.
        proved: groups of `earlier` that are stored for all of its shards (`stored_parts.proved_groups`).
    """
    asked = [hook.key for hook in spec.hooks]
    groups: list[HookGroup] = []
    known = dict(d_in)
    shard_rows = None
    tokens = spec.tokens
    if manifest is not None:
        groups, shard_rows = list(manifest.groups), manifest.rows_per_shard
        known = {hook.name: hook.d_in for hook in manifest.hooks} | known
        tokens = max(tokens, manifest.tokens)
    elif earlier is not None:
        for number, group in enumerate(earlier.groups):
            if number not in proved and not set(group.hooks) <= set(asked):
                break
            groups.append(group)
        known = earlier.model.d_in | known
        shard_rows = earlier.rows_per_shard if groups else None
        tokens = max(tokens, earlier.tokens) if 0 in proved else tokens
    held = {hook for group in groups for hook in group.hooks}
    new = [hook for hook in asked if hook not in held]
    if new:
        groups.append(HookGroup(hooks=new))
    if shard_rows is None:
        shard_rows = rows_per_shard(spec, d_in)
    return CacheShape(
        groups=groups,
        d_in={hook: known[hook] for group in groups for hook in group.hooks},
        rows_per_shard=shard_rows,
        tokens=tokens,
    )
