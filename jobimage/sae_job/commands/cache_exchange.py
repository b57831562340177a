"""`sae-job cache export | import`: SAELens's data sets of cached activations, out of and into caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sae_job.commands.bars import progress_bar
from sae_job.commands.place import EndpointUrl, Region, StoreRoot, format_bytes, open_place
from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    from sae_job.activations.saelens_export import Exported
    from sae_operator.api.activation_cache import Positions

Hook = Annotated[
    str | None,
    typer.Option("--hook", help="Hook, e.g. blocks.8.hook_resid_post; the only one by default.", show_default=False),
]
PositionsText = Annotated[
    str | None,
    typer.Option(
        "--positions",
        metavar="START:STOP[:STEP]",
        help="Positions of a context, as a slice in Python; all that there are by default.",
        show_default=False,
    ),
]

EXPORT_EPILOG = (
    "sae-job cache export s3://saes/caches/team-a/0123456789abcdef ./activations --hook blocks.8.hook_resid_post\n\n"
    "sae-job cache export ./store/caches/default/0123456789abcdef ./out --shuffle --hub-repo me/acts --private"
)
IMPORT_EPILOG = (
    "sae-job cache import ./activations s3://saes/imported/gpt2-l8 --model gpt2 --dataset Skylion007/openwebtext\n\n"
    "sae-job cache import ./sliced ./store/l8 --model gpt2 --dataset a/b --context-size 128 --positions 5:-5"
)


def export_cache(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The cache's folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it must be empty or missing.")],
    hook: Hook = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            "--dtype",
            help="Number format; by default float16 where it is stored so, float32 otherwise.",
            show_default=False,
        ),
    ] = None,
    positions: PositionsText = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Write the contexts in a shuffled order; needs room for them twice.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of that order.")] = 0,
    hub_repo: Annotated[
        str | None,
        typer.Option("--hub-repo", help="Push to this data set on the Hugging Face Hub, too.", show_default=False),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the data set on the Hub a private one.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="Branch on the Hub for data and metadata; the default one.", show_default=False
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Write one hook of a cache as a data set that SAELens reads as its own cached activations.

    A row is a whole context: contexts of which filters dropped rows are left out.
    Positions at which no context has a row, such as BOS's, are no part of it: the context size to read it with is told.
    """
    if hub_repo is None and (private or revision is not None):
        raise InvalidInput("MissingOption", "--private and --revision are about a data set on the Hub: add --hub-repo")
    from sae_job.activations.manifest import read_manifest
    from sae_job.activations.saelens_export import CacheExport

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    manifest = read_manifest(place)
    if hook is None and len(manifest.hooks) > 1:
        names = ", ".join(held.name for held in manifest.hooks)
        raise InvalidInput("HookNotChosen", f"{place.uri} has the hooks {names}: choose one with --hook")
    export = CacheExport(
        place,
        manifest,
        manifest.hooks[0].name if hook is None else hook,
        dtype=dtype,
        positions=None if positions is None else _slice(positions),
    )
    with progress_bar("export", "contexts") as progress:
        done = export.write(
            folder,
            shuffle_seed=seed if shuffle else None,
            progress=lambda contexts: progress(contexts, export.contexts),
        )
    _tell_export(done, folder, stored=manifest.dtype)
    if hub_repo is not None:
        from huggingface_hub import HfApi

        from sae_job.activations.saelens_hub import push_dataset

        with progress_bar("convert", "files") as progress:
            push_dataset(
                folder,
                done.files,
                hub_repo,
                private=private,
                revision=revision,
                metadata=export.metadata(),
                api=HfApi(),
                progress=lambda files: progress(files, len(done.files)),
            )
        where = "" if revision is None else f" at {revision}"
        typer.echo(f"pushed to https://huggingface.co/datasets/{hub_repo}{where}")


def _tell_export(done: Exported, folder: Path, *, stored: str) -> None:
    shape = done.shape
    size = format_bytes(done.contexts * shape.context_bytes)
    typer.echo(
        f"{folder}: {done.contexts:,} contexts of {shape.positions} positions of {shape.hook} in {shape.dtype}, {size}"
    )
    if shape.dtype != stored:
        typer.echo(f"values were stored in {stored}, which the data set cannot hold: they are written in {shape.dtype}")
    if done.left_out:
        typer.echo(f"{done.left_out:,} contexts lack some of their rows and are left out")
    if done.positions != list(range(done.context_size)):
        typer.echo(
            f"positions {_ranges(done.positions)} of {done.context_size} are there: use context_size "
            f"{shape.positions} to read them"
        )


def import_dataset(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set that SAELens's caching wrote.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="Folder of the cache to make.")],
    model: Annotated[str, typer.Option("--model", help="Model that the activations are of.", show_default=False)],
    dataset: Annotated[str, typer.Option("--dataset", help="Data set of the text.", show_default=False)],
    context_size: Annotated[
        int | None,
        typer.Option(
            "--context-size", min=2, help="Tokens of a context; those of a row by default.", show_default=False
        ),
    ] = None,
    positions: PositionsText = None,
    hook: Hook = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float8", "int8"] | None,
        typer.Option(
            "--dtype",
            help="Number format of the cache; by default the data set's, at most float32.",
            show_default=False,
        ),
    ] = None,
    loader: Annotated[
        Literal["HuggingFace", "TransformerLens"],
        typer.Option("--loader", help="Library whose names of hooks and weights these are."),
    ] = "TransformerLens",
    prepend_bos: Annotated[bool, typer.Option(help="Whether contexts were made to begin with BOS.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the order of rows inside a shard.")] = 0,
    shard_bytes: Annotated[int, typer.Option("--shard-bytes", min=4096, max=2**34, help="Size of a shard, about.")] = 2
    ** 28,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Make a finished cache of a data set of activations that SAELens cached.

    What the data set does not tell of itself is given by --model and --dataset, and recorded.
    An import that was interrupted goes on where it was.
    """
    from sae_job.steps.import_saelens import Imported, import_activations

    place = open_place(uri, endpoint_url=endpoint_url, region=region, store_root=store)
    with progress_bar("import", "contexts") as progress:
        done: Imported = import_activations(
            folder,
            place,
            hook=hook,
            model=model,
            loader=loader,
            dataset=dataset,
            context_size=context_size,
            positions=None if positions is None else _slice(positions),
            prepend_bos=prepend_bos,
            dtype=dtype,
            seed=seed,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    if done.adopted:
        typer.echo(f"{place.uri} holds this data set already")
    typer.echo(
        f"{place.uri}: {done.manifest.tokens:,} rows of {done.manifest.hooks[0].name} in "
        f"{len(done.manifest.shards)} shards, {format_bytes(done.manifest.bytes)}, mean norm "
        f"{done.manifest.hooks[0].mean_norm:.4g}"
    )
    typer.echo(f"train on it with  spec: {{activations: {{uri: {place.uri!r}}}}}")


def _slice(text: str) -> Positions:
    from sae_operator.api.activation_cache import Positions

    match = re.fullmatch(r"(-?\d*):(-?\d*)(?::(\d+))?", text.strip())
    if match is None or "-" in (match[1], match[2]) or match[3] == "0":
        raise InvalidInput("InvalidPositions", f"{text!r} is no slice of positions: write e.g. 1: or 5:-5 or 0:128:2")
    return Positions(
        start=int(match[1] or 0), stop=int(match[2]) if match[2] else None, step=int(match[3]) if match[3] else 1
    )


def _ranges(numbers: list[int]) -> str:
    """Numbers in a few words: `1–127`, or how they begin and end."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"{', '.join(map(str, numbers[:4]))}, … {numbers[-1]}"
