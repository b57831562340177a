"""Credentials are taken out of texts that people read, and nothing else is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_operator.api.redaction import redact

PLANTED = "p1AntedS3cret"
# Forms that a credential comes in; `{}` is the secret part.
SECRETS = [
    "Could not connect to https://minio:{}@s3.example.com/bucket",
    "http://{}@10.0.0.1:9000: refused",
    "postgres://user:a@{}@db/x",
    "GET https://s3/x?X-Amz-Expires=60&X-Amz-Signature={} failed",
    "GET https://s3/x?X-Amz-Credential={}%2F20260101&y=1",
    "https://blob/x?sv=2020&sig={}",
    "https://hub/api?token={}",
    "AWS_SECRET_ACCESS_KEY={}",
    "aws_secret_access_key: {}",
    "secretAccessKey={} is wrong",
    "{{'AWS_SESSION_TOKEN': '{}'}}",
    'says {{"password": "{}"}}',
    'says "{{\\"password\\": \\"{}\\"}}"',
    "HF_TOKEN={}",
    "Authorization: Bearer {}",
    "authorization: {}",
    "header 'Bearer {}'",
    "api_key={}, other=1",
    "WANDB_API_KEY={}",
    "AKIA{}",
    '"password": "correct horse, {}; x) y"',
    "passphrase='at {} and {}' is wrong",
    "{{'client_secret': 'a {} b'}}",
]


def whole(form: str, secret: str) -> str:
    # A key's id has capital letters and digits alone.
    return form.replace("{}", "{0}").format(secret.upper() if form.startswith("AKIA") else secret)


@pytest.mark.parametrize("form", SECRETS)
def test_a_credential_is_taken_out(form: str) -> None:
    said = redact(whole(form, PLANTED))
    assert PLANTED.lower() not in said.lower()
    assert "***" in said


@pytest.mark.parametrize("form", SECRETS)
def test_json_stays_json(form: str) -> None:
    text = json.dumps({"exitCode": 1, "message": whole(form, PLANTED), "tokens": 5})
    said = redact(text)
    assert PLANTED.lower() not in said.lower()
    read = json.loads(said)
    assert (read["exitCode"], read["tokens"]) == (1, 5)


@given(
    st.lists(st.sampled_from(["password", "api_key", ":", "=", " ", '"', "'", "\\", ",", "}", "x", "\n"]), max_size=14)
)
@settings(max_examples=300, deadline=None)
def test_json_stays_json_whatever_stands_in_it(parts: list[str]) -> None:
    text = "".join(parts)
    for value in (text, json.dumps(text), json.dumps([text, {"password": text}])):
        whole = json.dumps({"message": value, "it's": "'", "tokens": 5})
        assert json.loads(redact(whole))["tokens"] == 5


@pytest.mark.parametrize(
    "token",
    [
        "hf_abcdefghijklmnopqrst",
        "ghp_0123456789abcdef0123",
        "sk-0123456789abcdef0123",
        "xoxb-0123456789-abc",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def",
    ],
)
def test_a_token_is_known_by_its_beginning(token: str) -> None:
    assert redact(f"refused {token} there") == "refused *** there"


def test_a_private_key_is_taken_out() -> None:
    assert redact("x -----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- y") == "x *** y"


@pytest.mark.parametrize(
    "text",
    [
        "stored 1000000 tokens at s3://saes/out/caches/0a1b2c",
        "tokens: 500, tokensPerSecond=12",
        '{"tokens":900,"tokensPerSecond":450.0}',
        'Secret "s3" not found; create the Secret in namespace lab',
        'MountVolume.SetUp failed for volume "secret-0" : secret "s3" not found',
        "spec.run.env[0].secretKeyRef: name must be set",
        "spec.output.secretRef.name: must match",
        "no such key: key in Secret s3",
        "NoSuchKey: The specified key does not exist",
        "see s3://saes/out/report.html",
        "http://127.0.0.1:9000 does not answer",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "ghcr.io/sae-operator/job@sha256:0123",
        "spec.sae.task-name is unknown",
        "docker://alpine@sha256:0123",
        '{"message":"the password:","tokens":5}',
        '["api_key=", "wandb"]',
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redact(text) == text
