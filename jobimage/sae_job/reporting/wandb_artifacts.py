"""SAEs as artifacts of Weights & Biases, uploaded beside the training."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)


class SavesSae(Protocol):
    def __call__(self, sae: Any, log10_frequencies: Any, folder: Path) -> tuple[list[Path], list[Path]]:
        """Write an SAE into a folder; its files, and those of its firing frequencies."""
        ...


class ArtifactUploads:
    """Uploads in threads: the client asks the server before it takes an artifact, and waits for its answer.

    Args:
        directory: for files until the client has taken copies.
        save_sae: writes an SAE.
    """

    def __init__(self, directory: Path, save_sae: SavesSae) -> None:
        self._directory = directory
        self._save_sae = save_sae
        self._threads: list[threading.Thread] = []

    @property
    def busy(self) -> bool:
        """Whether an upload is going on: where one hangs, more would only pile up."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return bool(self._threads)

    def start(
        self, run: Run, name: str, metadata: Mapping[str, Any], sae: Any, log10_frequencies: Any, *, alias: str
    ) -> None:
        """Begin to upload an SAE.

        Args:
            run: whose artifact it is.
            name: of the artifact.
            metadata: of the artifact.
            sae: what `save_sae` takes.
            log10_frequencies: of its latents, for an artifact of their own; None where they are not known.
            alias: of this version.
        """
        upload = partial(self._upload, run, name, dict(metadata), sae, log10_frequencies, alias)
        self._threads.append(threading.Thread(target=upload, name=f"artifact {name}", daemon=True))
        self._threads[-1].start()

    def wait(self, seconds: float, now: Callable[[], float]) -> None:
        """Wait for the uploads, no longer than so many seconds for all of them."""
        deadline = now() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - now()))

    def _upload(
        self, run: Run, name: str, metadata: dict[str, Any], sae: Any, log10_frequencies: Any, alias: str
    ) -> None:
        import wandb

        folder = self._directory / run.id / alias
        try:
            model_files, sparsity_files = self._save_sae(sae, log10_frequencies, folder)
            kinds = (
                (name, "model", model_files, metadata),
                (f"{name}_log_feature_sparsity", "log_feature_sparsity", sparsity_files, None),
            )
            for artifact_name, kind, paths, told in kinds:
                if paths:
                    artifact = wandb.Artifact(artifact_name, type=kind, metadata=told)
                    for path in paths:
                        artifact.add_file(str(path))
                    run.log_artifact(artifact, aliases=[alias])
        except Exception as error:  # noqa: BLE001 - the SAE is in the output all the same
            logger.warning("%s %s was not uploaded to Weights & Biases: %s", name, alias, error)
        finally:
            # The client has taken copies.
            shutil.rmtree(folder, ignore_errors=True)
