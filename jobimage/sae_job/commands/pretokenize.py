"""`sae-job pretokenize`: tokenize a data set once, for many caches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from sae_job.commands.place import EndpointUrl, Region, StoreRoot, open_place
from sae_job.errors import InvalidInput, Stopped
from sae_operator.api.steps import ExitCode

if TYPE_CHECKING:
    from sae_job.steps.pretokenize import Output

PRETOKENIZE_EPILOG = (
    "sae-job pretokenize --model gpt2 --dataset ./texts --context-size 256 --output s3://saes/tokens/texts-gpt2\n\n"
    "sae-job pretokenize --tokenizer google/gemma-2-2b --dataset Skylion007/openwebtext --max-tokens 1000000000 "
    "--hub-repo me/openwebtext-gemma --hub-private\n\n"
    "A cache then names the result as spec.dataset.path. With --no-shuffle its contexts are those that the cache would "
    "make from the text itself."
)
# Field of a spec, in its own or in Python's form -> the option that it is here.
_OPTIONS = {
    "path": "--dataset",
    "name": "--name",
    "split": "--split",
    "column": "--column",
    **{field: f"--{field.replace('_', '-')}" for field in ("begin_context", "begin_document", "between_documents")},
    "beginContext": "--begin-context",
    "beginDocument": "--begin-document",
    "betweenDocuments": "--between-documents",
}
_TOKEN = "bos, eos, sep, a token id, or none."


def pretokenize(
    dataset: Annotated[str, typer.Option("--dataset", help="Hub id, file, folder, or s3:// address of the text.")],
    model: Annotated[str | None, typer.Option("--model", help="Model whose tokenizer is used.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer, in place of --model.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the data set.")] = "train",
    column: Annotated[str | None, typer.Option("--column", help="Column with text.")] = None,
    context_size: Annotated[int, typer.Option("--context-size", min=2, help="Tokens per context.")] = 128,
    begin_context: Annotated[str, typer.Option(help=f"Token that begins every context: {_TOKEN}")] = "bos",
    begin_document: Annotated[str, typer.Option(help=f"Token that begins every document: {_TOKEN}")] = "none",
    between_documents: Annotated[str, typer.Option(help=f"Token between documents: {_TOKEN}")] = "bos",
    shuffle: Annotated[bool, typer.Option(help="Shuffle the contexts.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of that order.")] = 0,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Stop after so many tokens.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder, or file:// or s3:// address.")] = None,
    hub_repo: Annotated[str | None, typer.Option("--hub-repo", help="Data set's repository on the Hub.")] = None,
    hub_revision: Annotated[str, typer.Option("--hub-revision", help="Branch there; made when missing.")] = "main",
    hub_private: Annotated[bool, typer.Option("--hub-private", help="Make a new repository private.")] = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    store: StoreRoot = None,
) -> None:
    """Tokenize a data set once into contexts: parquet files of about 64 MB, and sae_lens.json, which is written last.

    Caches, the datasets library and SAELens read the result. Nothing of the text is lost but the last, incomplete
    context. Up to 268 million tokens are held in memory (1 GiB) and shuffled together; longer texts are shuffled in
    parts of that size. The same command after an interruption begins anew and writes over what is unfinished.
    """
    from sae_job.commands.bars import progress_bar
    from sae_job.steps.pretokenize import Pretokenization, StoreOutput, pretokenize_documents
    from sae_job.steps.stopping import stop_on_signals
    from sae_job.storage.open import open_store
    from sae_job.text.documents import open_documents
    from sae_job.text.tokenize import TextTokenizer, load_tokenizer
    from sae_operator.api.activation_cache import DatasetSource, ModelSource, Separators
    from sae_operator.api.store import StoreAccess

    tokenizer_name = tokenizer or model
    if tokenizer_name is None:
        raise InvalidInput("TokenizerMissing", "name a tokenizer with --tokenizer, or a model with --model")
    if output is None and hub_repo is None:
        raise InvalidInput("OutputMissing", "say where the contexts go with --output or --hub-repo")
    blamed = "--tokenizer" if tokenizer else "--model"
    access = StoreAccess(endpoint_url=endpoint_url, region=region) if dataset.startswith("s3://") else None
    try:
        with _blaming_options():
            wanted = Pretokenization(
                # A folder's own name would mean nothing elsewhere, but its path at least tells where it came from.
                tokenizer_name=os.path.abspath(tokenizer_name) if os.path.isdir(tokenizer_name) else tokenizer_name,
                dataset=DatasetSource(path=dataset, name=name, split=split, column=column, store=access),
                context_size=context_size,
                separators=Separators(
                    begin_context=begin_context, begin_document=begin_document, between_documents=between_documents
                ),
                shuffle=shuffle,
                seed=seed,
                max_tokens=max_tokens,
            )
            outputs: list[Output] = []
            if output is not None:
                place = open_place(output, endpoint_url=endpoint_url, region=region, store_root=store)
                outputs.append(StoreOutput(place))
            if hub_repo is not None:
                outputs.append(_hub_output(hub_repo, hub_revision, hub_private))
            expected = 0 if max_tokens is None else max_tokens // context_size
            with stop_on_signals() as stop, progress_bar("pretokenize", "contexts") as progress:
                contexts = pretokenize_documents(
                    wanted,
                    open_documents(wanted.dataset, open_store=partial(open_store, local_root=store)),
                    TextTokenizer(load_tokenizer(ModelSource(name=tokenizer_name), field=blamed)),
                    outputs,
                    progress=lambda done: progress(done, max(done, expected)),
                    should_stop=stop,
                )
    except Stopped as stopped:
        typer.echo(f"sae-job: {stopped}", err=True)
        raise typer.Exit(ExitCode.STOPPED) from stopped
    typer.echo(f"{contexts:,} contexts of {context_size} tokens ({contexts * context_size:,} tokens)")


def _hub_output(repository: str, revision: str, private: bool) -> Output:
    from huggingface_hub import HfApi

    from sae_job.steps.pretokenize import HubOutput
    from sae_job.text.hub_waits import bound_hub_waits

    bound_hub_waits()
    return HubOutput(HfApi(), repository, revision, private)


@contextmanager
def _blaming_options() -> Iterator[None]:
    """Mistakes name the option to change."""
    from pydantic import ValidationError

    from sae_operator.api.activation_cache import Separators

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][-1])
        told = f"{first['input']!r} is none of {_TOKEN}" if where in Separators.model_fields else first["msg"]
        raise InvalidInput("InvalidOption", told.removesuffix("."), field=_OPTIONS.get(where, where)) from error
    except InvalidInput as error:
        option = error.field if error.field.startswith("--") else _OPTIONS.get(error.field.rpartition(".")[2], "")
        raise InvalidInput(error.reason, error.message, field=option) from error
