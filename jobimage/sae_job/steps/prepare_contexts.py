"""Blocks of contexts on the store, as many as the rows of a cache need, resumed from those that are there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sae_job.errors import InvalidInput, Stopped
from sae_job.models.facts import ModelFacts
from sae_job.steps.context import StepContext
from sae_job.storage.base import ObjectStore
from sae_job.text.blocks import BlockBuilder, BlockRecord, packing_of, read_block_records
from sae_job.text.documents import open_documents
from sae_job.text.plan import Plan, TokenizerRecord, plan_shards
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_job.text.tokenizer_check import check_metadata
from sae_operator.api.activation_cache import ActivationCacheSpec

logger = logging.getLogger(__name__)


def store_contexts(
    spec: ActivationCacheSpec, facts: ModelFacts, store: ObjectStore, context: StepContext, *, shard_rows: int
) -> tuple[list[BlockRecord], Plan]:
    """Store blocks until their contexts suffice for `spec.tokens` rows in shards of `shard_rows`."""
    records = read_block_records(store)
    plan = _plan(spec, shard_rows, records)
    if plan.rows >= spec.tokens:
        return records, plan
    last = records[-1] if records else None
    text_tokens = 0
    if last is None or not last.exhausted:
        builder = block_builder(spec, facts, records, context)
        while plan.rows < spec.tokens:
            record = builder.write_next(store)
            text_tokens = builder.tokens_seen
            if record is None:
                break
            records.append(record)
            plan = _plan(spec, shard_rows, records)
            context.reporter.update(tokens=min(plan.rows, spec.tokens))
            if record.exhausted:
                break
    if not records:
        raise InvalidInput(
            "NoTokens",
            f"{spec.dataset.path!r} has {text_tokens} tokens, which do not fill one context of {spec.context_size}; "
            "give more text",
            field="spec.dataset.path",
        )
    if plan.rows < spec.tokens:
        raise not_enough_text(spec, records, plan)
    return records, plan


def not_enough_text(spec: ActivationCacheSpec, records: Sequence[BlockRecord], plan: Plan) -> InvalidInput:
    usable = sum(sum(record.usable) for record in records)
    reserve = f" ({usable} with those that the norm filter may drop)" if usable > plan.rows else ""
    fix = f"lower it to {plan.rows} or give more text" if plan.rows else "give more text"
    return InvalidInput(
        "NotEnoughText",
        f"{spec.dataset.path!r} gives {plan.rows} rows{reserve}, fewer than the {spec.tokens} asked for; {fix}",
        field="spec.tokens",
    )


def _plan(spec: ActivationCacheSpec, shard_rows: int, records: Sequence[BlockRecord]) -> Plan:
    usable = [np.asarray(record.usable, dtype=np.int32) for record in records]
    contexts = np.concatenate(usable) if usable else np.zeros(0, dtype=np.int32)
    return plan_shards(contexts, spec.tokens, spec, shard_rows=shard_rows)


def block_builder(
    spec: ActivationCacheSpec, facts: ModelFacts, records: Sequence[BlockRecord], context: StepContext
) -> BlockBuilder:
    """A builder that goes on after the last complete block, with the same text and tokenizer as before.

    Raises:
        InvalidInput: either has changed since.
    """
    last = records[-1] if records else None
    documents = open_documents(
        spec.dataset, revision=None if last is None else last.dataset.revision, open_store=context.open_store
    )
    tokenizer = _tokenizer(facts, needed=not documents.tokenized)
    if documents.tokenized:
        logger.info("%r holds token ids: prependBos and separators have no effect", spec.dataset.path)
        check_metadata(
            documents.metadata(),
            tokenizer,
            model=spec.model.name,
            path=spec.dataset.path,
            context_size=spec.context_size,
        )
    special = packing_of(spec, documents, tokenizer, facts.vocabulary)
    record = TokenizerRecord(
        name=spec.model.name,
        sha256="" if tokenizer is None else tokenizer.sha256(),
        bos_token_id=None if tokenizer is None else tokenizer.bos_token_id,
        special_token_ids=[] if tokenizer is None else tokenizer.special_token_ids(),
        begin_context=special.begin_context,
        begin_document=special.begin_document,
        between_documents=special.separator,
    )
    if last is not None and last.dataset.fingerprint != documents.record.fingerprint:
        raise InvalidInput(
            "DatasetChanged",
            f"the files of {spec.dataset.path!r} are not those that this cache was begun with; "
            "bring them back, or make a new cache (another seed or storage.uri)",
            field="spec.dataset.path",
        )
    if last is not None and last.tokenizer.sha256 != record.sha256:
        raise InvalidInput(
            "TokenizerChanged",
            f"the tokenizer of {spec.model.name!r} is not the one that this cache was begun with; "
            "bring it back, or make a new cache (another seed or storage.uri)",
            field="spec.model.name",
        )

    def stop_if_asked() -> None:
        if context.should_stop():
            raise Stopped("blocks of contexts that were finished are stored; the next attempt goes on after them")

    return BlockBuilder(
        spec,
        documents,
        tokenizer,
        record,
        vocabulary=facts.vocabulary,
        previous=last,
        first_block=len(records),
        between_batches=stop_if_asked,
    )


def _tokenizer(facts: ModelFacts, *, needed: bool) -> TextTokenizer | None:
    """The model's tokenizer; None when it has none and none is needed."""
    try:
        return TextTokenizer(load_tokenizer(facts.source, revision=facts.revision))
    except InvalidInput as error:
        if needed:
            raise
        logger.info("going on without a tokenizer: %s", error.message)
        return None
