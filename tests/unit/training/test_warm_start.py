"""SAEs that begin with saved weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.saes.base import SAE
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_job.training.trainer import Trainer
from sae_job.training.warm_start import check_start, load_starts
from sae_operator.api.store import StoreLocation
from tests.small_training import EVERY_KIND, TRAINING

START = {"startFrom": {"uri": "file://saved"}}


def saved_in(folder: Path) -> Callable[[StoreLocation], ObjectStore]:
    return lambda location: FileStore(folder, location.uri)


def trained(new_trainer: Callable[..., Trainer], sae: dict[str, Any], **parts: Any) -> SAE:
    trainer = new_trainer([sae], **parts)
    while not trainer.finished:
        trainer.step()
    return trainer.saes[0].inference()


@pytest.mark.parametrize("kind", list(EVERY_KIND))
def test_it_begins_as_the_saved_sae_ended(new_trainer: Callable[..., Trainer], tmp_path: Path, kind: str) -> None:
    """Under another scale of activations, too: the copy for use is the same."""
    saved = trained(new_trainer, EVERY_KIND[kind])
    saved.save(FileStore(tmp_path), "", layout="saelens6")
    sae = {**EVERY_KIND[kind], **START}
    plan = new_trainer([sae], normalization="none").plan
    starts = load_starts(plan, saved_in(tmp_path))
    trainer = new_trainer([sae], normalization="none", starts=starts)
    begun = trainer.saes[0].inference()
    rows = 2 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(begun(rows), saved(rows), rtol=1e-4, atol=1e-4)
    trainer.step()
    assert trainer.saes[0].failure is None


def test_only_the_others_are_initialised_from_data(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    saved = trained(new_trainer, EVERY_KIND["topk"])
    both = [{**EVERY_KIND["topk"], **START}, EVERY_KIND["standard"]]
    trainer = new_trainer(both, starts={"topk": saved})
    alone = new_trainer([EVERY_KIND["standard"]])
    ours, theirs = trainer.saes[1].tensors(), alone.saes[0].tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    torch.testing.assert_close(trainer.saes[0].inference().W_enc, saved.W_enc)


def refused(new_trainer: Callable[..., Trainer], saved: SAE, changed: dict[str, Any], **parts: Any) -> InvalidInput:
    plan = new_trainer([EVERY_KIND["standard"], {**changed, **START}], **parts).plan
    with pytest.raises(InvalidInput) as caught:
        check_start(plan, 1, saved)
    assert caught.value.field == "spec.saes[1].startFrom"
    return caught.value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dSae": 30}, "its dSae is 20, and 30 is asked for"),
        ({"hook": "other"}, "its dIn is 6, and 5 is asked for"),
        ({"architecture": {"type": "batchtopk", "k": 3}}, "it is of architecture topk, and batchtopk is asked for"),
        ({"applyBDecToInput": False}, "its encoder has applyBDecToInput true: set it alike"),
        ({"targetHook": "layer"}, "one of the two is a transcoder"),
    ],
)
def test_one_that_does_not_fit_is_refused(
    new_trainer: Callable[..., Trainer], changes: dict[str, Any], told: str
) -> None:
    saved = trained(new_trainer, EVERY_KIND["topk"])
    assert told in refused(new_trainer, saved, {**EVERY_KIND["topk"], **changes}).message


def test_one_of_another_hook_is_refused(new_trainer: Callable[..., Trainer]) -> None:
    saved = trained(new_trainer, EVERY_KIND["transcoder"])
    told = refused(new_trainer, saved, {**EVERY_KIND["transcoder"], "targetHook": "layer"}).message
    assert "its dOut is 5, and 6 is asked for" in told
    alike = trained(new_trainer, EVERY_KIND["topk"])
    alike.cfg = type(alike.cfg)(**{**vars(alike.cfg), "hook_name": "elsewhere"})
    assert "it is of hook elsewhere, and layer is asked for" in refused(new_trainer, alike, EVERY_KIND["topk"]).message


@pytest.mark.parametrize(("saved", "asked"), [("tanh-relu", "relu"), ("relu", "tanh-relu")])
def test_one_of_another_activation_function_is_refused(
    new_trainer: Callable[..., Trainer], saved: str, asked: str
) -> None:
    def standard(activation: str) -> dict[str, Any]:
        architecture = {"type": "standard", "l1Coefficient": 0.1, "activation": activation}
        return {**EVERY_KIND["standard"], "name": "other", "architecture": architecture}

    told = refused(new_trainer, trained(new_trainer, standard(saved)), standard(asked)).message
    assert f"its activation function is {saved}, and {asked} is asked for" in told


def test_one_that_normalises_otherwise_is_refused(new_trainer: Callable[..., Trainer]) -> None:
    saved = trained(new_trainer, EVERY_KIND["topk"])
    told = refused(new_trainer, saved, EVERY_KIND["topk"], normalization="layer_norm").message
    assert "it normalises its inputs by none, and the job by layer_norm" in told


def test_a_finetuned_one_needs_a_decoder_that_may_have_any_length(new_trainer: Callable[..., Trainer]) -> None:
    training = {**TRAINING, "finetuning": {"method": "scale", "tokens": 64}}
    saved = trained(new_trainer, EVERY_KIND["topk"], training=training)
    assert "set normalizeDecoder: false" in refused(new_trainer, saved, EVERY_KIND["topk"]).message
    free = {**EVERY_KIND["topk"], "normalizeDecoder": False}
    trainer = new_trainer([{**free, **START}], starts={"topk": saved})
    rows = 2 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trainer.saes[0].inference()(rows), saved(rows), rtol=1e-4, atol=1e-4)


def test_one_whose_norms_decide_what_is_selected_needs_a_decoder_that_keeps_them(
    new_trainer: Callable[..., Trainer],
) -> None:
    saved = trained(new_trainer, EVERY_KIND["topk"])
    saved.W_dec *= torch.linspace(0.5, 2.0, saved.cfg.d_sae).unsqueeze(1)
    with pytest.raises(InvalidInput, match="set normalizeDecoder: false") as caught:
        new_trainer([{**EVERY_KIND["topk"], **START}], starts={"topk": saved})
    assert caught.value.field == "spec.saes[0].startFrom"


def test_one_that_is_not_there_is_told_with_its_field(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    plan = new_trainer([{**EVERY_KIND["topk"], **START}]).plan
    with pytest.raises(InvalidInput) as caught:
        load_starts(plan, saved_in(tmp_path))
    assert (caught.value.reason, caught.value.field) == ("SaeNotFound", "spec.saes[0].startFrom")
