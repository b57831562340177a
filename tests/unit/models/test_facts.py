"""What is refused by a model's facts alone."""

from __future__ import annotations

import pytest

from sae_job.errors import InvalidInput
from sae_job.models.facts import check_batch_size
from sae_operator.api.activation_cache import ModelSource


def test_a_forward_pass_may_take_a_block_of_text_and_no_more() -> None:
    check_batch_size(ModelSource(name="gpt2", batch_size=2048), 512)
    with pytest.raises(InvalidInput, match="2049 contexts of 512 tokens are more than the 2048") as refused:
        check_batch_size(ModelSource(name="gpt2", batch_size=2049), 512)
    assert (refused.value.reason, refused.value.field) == ("BatchTooLarge", "spec.model.batchSize")
