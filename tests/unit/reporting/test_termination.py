"""The termination message fits in 4096 bytes whatever it has to say, and never loses a figure before a text."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sae_job.reporting.termination import encode_result, write_result
from sae_operator.api.steps import TERMINATION_MESSAGE_BYTES, SaeProgress, StepResult


def test_a_short_result_is_sent_whole() -> None:
    result = StepResult(step="train", exit_code=0, reason="Completed", tokens=12)
    assert StepResult.model_validate_json(encode_result(result)) == result


@given(
    message=st.text(max_size=6000),
    texts=st.lists(st.text(max_size=600), min_size=1, max_size=16),
    variance=st.floats(0, 1),
)
def test_a_long_result_is_cut_to_the_limit_with_its_figures(message: str, texts: list[str], variance: float) -> None:
    saes = [
        SaeProgress(name=f"sae-{index}", phase="Failed", message=text, explained_variance=variance, l0=32.0, mse=1.5)
        for index, text in enumerate(texts)
    ]
    encoded = encode_result(StepResult(step="train", exit_code=0, reason="Completed", message=message, saes=saes))
    assert len(encoded) <= TERMINATION_MESSAGE_BYTES
    decoded = StepResult.model_validate_json(encoded)
    assert decoded.saes is not None
    assert [sae.explained_variance for sae in decoded.saes] == [variance] * len(texts)


def test_the_file_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.write_bytes(b"x" * 9000)
    inode = path.stat().st_ino
    write_result(StepResult(step="prepare", exit_code=2, reason="NoTokens"), path)
    assert path.stat().st_ino == inode
    assert StepResult.model_validate_json(path.read_bytes()).reason == "NoTokens"


def test_credentials_are_left_out_of_its_texts() -> None:
    text = "https://user:hunter2@s3/x?X-Amz-Signature=deadbeef: refused"
    saes = [SaeProgress(name="a", phase="Failed", message=text)]
    encoded = encode_result(StepResult(step="train", exit_code=1, reason="Error", message=text, saes=saes))
    decoded = StepResult.model_validate_json(encoded)
    assert decoded.message == "https://***@s3/x?X-Amz-Signature=*** refused"
    assert decoded.saes is not None
    assert decoded.saes[0].message == decoded.message
