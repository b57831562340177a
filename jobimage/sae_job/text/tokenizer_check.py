"""Whether token ids that were made elsewhere are those of the model's tokenizer."""

from __future__ import annotations

import json
import logging

from sae_job.errors import InvalidInput
from sae_job.text.hub import first_line, is_connection_trouble
from sae_job.text.local_files import METADATA_FILE
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_operator.api.activation_cache import ModelSource

logger = logging.getLogger(__name__)


def check_metadata(
    metadata: bytes | None, tokenizer: TextTokenizer | None, *, model: str, path: str, context_size: int
) -> None:
    """Compare what `sae_lens.json` says of a data set of token ids with the model's tokenizer and the context size.

    Without the file, or where its tokenizer cannot be fetched, nothing is compared.

    Args:
        metadata: content of the file.
        tokenizer: the model's; None when it has none.
        model: its name.
        path: the data set's.

    Raises:
        InvalidInput: vocabularies differ, or rows are shorter than contexts.
    """
    if metadata is None:
        return
    try:
        facts = json.loads(metadata)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        logger.warning(
            "%s of %r is no JSON object: its tokenizer is not compared with the model's", METADATA_FILE, path
        )
        return
    size = facts.get("context_size")
    if isinstance(size, int) and size < context_size:
        raise InvalidInput(
            "RowTooShort",
            f"rows of {path!r} have {size} token ids ({METADATA_FILE}), fewer than contextSize {context_size}; "
            "lower it",
            field="spec.contextSize",
        )
    name = facts.get("tokenizer_name")
    if not isinstance(name, str) or tokenizer is None:
        return
    try:
        other = load_tokenizer(ModelSource(name=name))
    except Exception as error:
        if not isinstance(error, InvalidInput) and not is_connection_trouble(error):
            raise
        logger.warning(
            "the tokenizer %r of %r cannot be fetched, and is not compared with the model's: %s",
            name,
            path,
            first_line(error),
        )
        return
    if other.get_vocab() != tokenizer.tokenizer.get_vocab():
        raise InvalidInput(
            "TokenizerMismatch",
            f"{path!r} was tokenized with {name!r}, whose vocabulary is not that of {model!r}; give the model that it "
            "was made for, or text",
            field="spec.dataset.path",
        )
