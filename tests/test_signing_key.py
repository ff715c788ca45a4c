"""The key that signs: made once, a secret, outside the workspace, and good for one purpose at a time."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.environment import Settings, default_trust
from mlops_course.ledger import read_ledger
from mlops_course.security.anchor import anchor_file, anchor_ledger
from mlops_course.security.keys import create_key
from mlops_course.security.signing_key import (
    SigningKeyError,
    is_signed,
    key_fingerprint,
    sign_bytes,
    signing_key,
    signing_key_file,
    verifying_key,
    verifying_key_file,
)

FIRST = """
from mlops_course.environment import load_settings
from mlops_course.security.signing_key import key_fingerprint, signing_key
print(key_fingerprint(signing_key(load_settings()).public_key()))
"""


def test_processes_that_sign_first_at_the_same_time_make_one_key(settings: Settings) -> None:
    started = [subprocess.Popen([sys.executable, "-c", FIRST], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    names = {process.communicate(timeout=60)[0].strip() for process in started}
    assert names == {key_fingerprint(verifying_key(settings))}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_the_key_is_for_its_owner_alone(settings: Settings) -> None:
    path = signing_key_file(settings)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(SigningKeyError, match="others may read"):
        sign_bytes(settings, "test", b"")


def test_asking_for_settings_makes_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings.trust.exists()
    with pytest.raises(SigningKeyError, match="to verify with"):
        verifying_key(settings)
    assert not settings.trust.exists(), "who verifies without a key makes none"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert os.name == "nt" or default_trust() == Path("/elsewhere/mlops_course")


@pytest.mark.parametrize("where", [".", "trust", "a/b/../c"])
def test_a_trust_folder_in_the_workspace_is_refused(settings: Settings, where: str) -> None:
    inside = settings.model_copy(update={"trust": settings.home / where})
    for use in (signing_key_file, verifying_key_file):
        with pytest.raises(SigningKeyError, match="inside the workspace"):
            use(inside)


def test_a_link_into_the_workspace_is_inside_it(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(settings.home, target_is_directory=True)
    with pytest.raises(SigningKeyError, match="inside the workspace"):
        signing_key_file(settings.model_copy(update={"trust": tmp_path / "link" / "trust"}))


@pytest.mark.parametrize("kind", ["rsa", "another curve", "text", "nothing", "half"])
def test_what_is_no_key_of_this_kind_is_named_before_it_signs(settings: Settings, kind: str) -> None:
    sound, verified = signing_key_file(settings), verifying_key_file(settings)
    made = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP384R1())
    private = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    texts = {"text": b"-----BEGIN PRIVATE KEY-----\n", "nothing": b"", "half": sound.read_bytes()[:100]}
    sound.write_bytes(texts.get(kind, private))
    verified.write_bytes(texts.get(kind, public))
    with pytest.raises(SigningKeyError, match=sound.name):
        signing_key(settings)
    with pytest.raises(SigningKeyError, match=verified.name):
        verifying_key(settings)


def test_a_signature_is_of_one_key_for_one_purpose_and_one_content(settings: Settings) -> None:
    signature = sign_bytes(settings, "model", b"\x00content")
    assert is_signed(settings, "model", b"\x00content", signature)
    for purpose, content, other in (
        ("anchor", b"\x00content", signature),
        ("model", b"\x00content ", signature),
        ("model", b"", signature),
        ("model", b"\x00content", signature[:-1]),
        ("model", b"\x00content", b""),
        ("", b"model\n\x00content", signature),
    ):
        assert not is_signed(settings, purpose, content, other)


def test_a_public_key_alone_verifies(settings: Settings, tmp_path: Path) -> None:
    signature = sign_bytes(settings, "model", b"content")
    elsewhere = settings.model_copy(update={"trust": tmp_path / "elsewhere"})
    elsewhere.trust.mkdir()
    (elsewhere.trust / verifying_key_file(settings).name).write_bytes(verifying_key_file(settings).read_bytes())
    assert is_signed(elsewhere, "model", b"content", signature)
    assert sorted(path.name for path in elsewhere.trust.iterdir()) == [verifying_key_file(settings).name]


def test_a_machine_that_only_verifies_keeps_the_key_that_it_trusts(settings: Settings) -> None:
    create_key(settings, "desk", "predict")
    anchor_ledger(settings)
    (settings.trust / "signing_key.pem").unlink()
    trusted, anchors = verifying_key_file(settings).read_bytes(), anchor_file(settings).read_bytes()
    for use in (signing_key_file, signing_key, lambda settings: sign_bytes(settings, "model", b"")):
        with pytest.raises(SigningKeyError, match="only verifies"):
            use(settings)
    done = CliRunner().invoke(app, ["keys", "create", "desk", "--role", "predict"])
    assert done.exit_code == 0 and "isn't anchored: this machine only verifies" in done.stderr
    assert len(read_ledger(settings)) == 2
    assert CliRunner().invoke(app, ["ledger", "anchor"]).exit_code == 1
    assert (verifying_key_file(settings).read_bytes(), anchor_file(settings).read_bytes()) == (trusted, anchors)
    assert not (settings.trust / "signing_key.pem").exists()
