"""Tokenizers: loading, identity, special tokens, and texts to token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.text.code import code_refused, needs_code
from sae_job.text.contexts import SpecialTokens
from sae_job.text.hub import first_line, is_connection_trouble, is_local
from sae_job.text.hub_waits import bound_hub_waits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_operator.api.activation_cache import ModelSource, Separators


def load_tokenizer(
    source: ModelSource, *, revision: str | None = None, field: str = "spec.model.name"
) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model.

    Args:
        revision: commit on the Hub; the source's own revision when None.
        field: path of the model's name, for the message.

    Raises:
        InvalidInput: the model has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not is_local(source.name):
        bound_hub_waits()
    try:
        return AutoTokenizer.from_pretrained(
            source.name, revision=revision or source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if is_connection_trouble(error):
            raise
        if needs_code(error):
            raise code_refused(source.name, f"{field.rpartition('.')[0]}.trustRemoteCode") from error
        raise InvalidInput(
            "TokenizerUnreadable",
            f"{source.name!r} has no tokenizer that can be read: {first_line(error)}",
            field=field,
        ) from error


@dataclass(frozen=True)
class TextTokenizer:
    """Texts to token ids as a cache wants them: never truncated, without special tokens of the tokenizer's own."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids of each text, int64 [length]."""
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [torch.tensor(ids, dtype=torch.int64) for ids in batch["input_ids"]]

    @property
    def bos_token_id(self) -> int | None:
        value = self.tokenizer.bos_token_id
        return value if isinstance(value, int) else None

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return len(self.tokenizer)

    def packing(
        self, *, prepend_bos: bool, separators: Separators | None = None, vocabulary: int | None = None
    ) -> SpecialTokens:
        """Ids of the tokens that packing inserts.

        With `prepend_bos`, BOS begins every context and stands between documents, where the tokenizer has one; what
        `separators` names goes before that.

        Args:
            vocabulary: ids that `separators` names must be below this; below the tokenizer's own size when None.

        Raises:
            InvalidInput: the tokenizer has no token that `separators` names, or such an id is too large.
        """
        bos = self.bos_token_id if prepend_bos else None
        if separators is None:
            return SpecialTokens(begin_context=bos, separator=bos)
        limit = self.size if vocabulary is None else vocabulary
        return SpecialTokens(
            begin_context=self._named(separators.begin_context, bos, "beginContext", limit),
            begin_document=self._named(separators.begin_document, None, "beginDocument", limit),
            separator=self._named(separators.between_documents, bos, "betweenDocuments", limit),
        )

    def _named(self, token: str | None, otherwise: int | None, field: str, limit: int) -> int | None:
        if token is None:
            return otherwise
        if token == "none":
            return None
        if token.isdigit():
            if int(token) >= limit:
                raise InvalidInput(
                    "TokenizerMismatch",
                    f"there is no token {token}: ids are below {limit}",
                    field=f"spec.sampling.separators.{field}",
                )
            return int(token)
        value = getattr(self.tokenizer, f"{token}_token_id")
        if not isinstance(value, int) or value < 0:
            raise InvalidInput(
                "SpecialTokenMissing",
                f"the tokenizer has no {token.upper()} token; write a token id or none",
                field=f"spec.sampling.separators.{field}",
            )
        return value

    def special_token_ids(self) -> list[int]:
        """Ids of every special token that the tokenizer knows of, ascending.

        These are all its `*_token_id` attributes, the tokens of its special-tokens map, and its further special tokens.
        """
        ids: set[int] = set()
        for name in dir(self.tokenizer):
            if name.endswith("_token_id"):
                value = getattr(self.tokenizer, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    ids.add(value)
        for value in self.tokenizer.special_tokens_map.values():
            for token in value if isinstance(value, list | tuple) else [value]:
                known = self.tokenizer.convert_tokens_to_ids(str(token))
                if isinstance(known, int):
                    ids.add(known)
        ids.update(int(value) for value in self.tokenizer.all_special_ids)
        # Some models have a pad token id of -1, which means none.
        return sorted(value for value in ids if value >= 0)

    def sha256(self) -> str:
        """Digest of what decides token ids: the serialisation (the vocabulary, for a slow one) and special tokens."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and hasattr(backend, "to_str"):
            content = json.loads(backend.to_str())
            # State of the last call, not of the tokenizer.
            content.pop("truncation", None)
            content.pop("padding", None)
        else:
            content = sorted(self.tokenizer.get_vocab().items())
        described = json.dumps([content, self.bos_token_id, self.special_token_ids()], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()
