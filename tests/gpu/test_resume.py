"""On a GPU, a training that was stopped and goes on ends with the same bits, under deterministic operators."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_job.errors import Stopped
from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import Progress
from tests.small_cache import write_small_cache
from tests.small_training import Job, train_step


@pytest.mark.usefixtures("deterministic")
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_small_cache(FileStore(cache))
    step = train_step(checkpoints={"everySeconds": 3600})
    undisturbed, stopped = (Job(cache, tmp_path / name, step) for name in ("undisturbed", "stopped"))
    undisturbed.run()
    trained = [0]

    def note(state: Progress) -> None:
        trained[0] = state.tokens

    with pytest.raises(Stopped):
        stopped.run(should_stop=lambda: trained[0] >= 256, listener=note)
    assert 0 < trained[0] < 600
    stopped.run()
    assert stopped.left() == undisturbed.left()
