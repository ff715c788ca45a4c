"""Signed bundles: each byte of each file counts, and so does the name; the library that signs says the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from bundle_helpers import reseal, rewrite
from conftest import settings_in
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mlops_course.deployment import ReleaseModels, start_release
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.security.envelopes import (
    Envelope,
    SignatureError,
    key_name,
    read_public_keys,
    seal,
    signed_bytes,
    unseal,
)
from mlops_course.security.signing import sign_bundle, signature_verifier, verify_signature
from mlops_course.serving.bundle import (
    ATTESTATIONS,
    BundleError,
    Verify,
    attach,
    bundles_folder,
    open_bundle,
    read_attestations,
)
from mlops_course.serving.models import LiveModels
from mlops_course.serving.packaging import Origin, write_bundle
from mlops_course.serving.publishing import live_bundle, live_file, publish, require_published_last

FIRST, SECOND = "flight-delay@1", "flight-delay@2"
SIGNED = ["MODEL_CARD.md", "bundle.json", "golden.json", "model.onnx"]


def make_keys(folder: Path, name: str, key: ec.EllipticCurvePrivateKey | None = None) -> Path:
    """A private key in a file; the public one is beside it."""
    key, pem = key or ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    written = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(written)
    written = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(written)
    return folder / f"{name}.key"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Ann's keys, whom the service trusts, and Eve's."""
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, "ann")
    make_keys(folder, "eve")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A workspace with two signed versions of a small model."""
    settings = settings_in(tmp_path_factory.mktemp("signed"))
    draw = np.random.default_rng(2013)
    rows = pd.DataFrame({name: draw.choice(["AA", "UA"], 500) for name in flight_delay.categorical})
    rows["wind_speed"] = (draw.random(500) * 40).astype(np.float32)
    rows["label"] = (rows["wind_speed"] > 25).astype(float)
    origin = Origin(run_id="5e43e4af", data={"features": "features@4"}, first="2013-01", last="2013-02")
    for number, name in enumerate((FIRST, SECOND)):
        model = train(rows, flight_delay, TrainingConfig(iterations=3 + number, leaf_samples=50))
        sign_bundle(write_bundle(settings, flight_delay, model, rows, name, origin), keys / "ann.key")
    return settings.home


@pytest.fixture
def settings(made: Path, tmp_path: Path) -> Settings:
    shutil.copytree(made, tmp_path / "workspace", dirs_exist_ok=True)
    return settings_in(tmp_path / "workspace")


@pytest.fixture
def own(settings: Settings) -> Path:
    """The second version, to be spoiled."""
    return bundles_folder(settings) / SECOND


@pytest.fixture(scope="module")
def verify(keys: Path) -> Verify:
    return signature_verifier(keys / "ann.pub")


def library_refuses(folder: Path, public_key: Path) -> bool:
    """What `model-signing` itself says."""
    from model_signing import verifying

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.verify(folder, folder / "model.sig")
    except Exception:  # whatever it raises
        return True
    return False


# ---------------------------------------------------------------- what is as it was signed


def test_a_signed_bundle_is_taken_and_the_library_takes_it_too(own: Path, keys: Path, verify: Verify) -> None:
    assert open_bundle(own, verify)[0].model == SECOND
    assert not library_refuses(own, keys / "ann.pub")


def test_the_signature_covers_every_file_but_itself(own: Path) -> None:
    outer = json.loads((own / "model.sig").read_bytes())
    statement = msgspec.json.decode(msgspec.convert(outer["dsseEnvelope"], Envelope).payload)
    assert [each["name"] for each in statement["predicate"]["resources"]] == SIGNED
    assert statement["subject"][0]["name"] == SECOND


def test_what_others_say_about_a_bundle_is_under_the_signature_as_well(own: Path, keys: Path, verify: Verify) -> None:
    attach(own, "sbom.cdx.json", b"{}")
    with pytest.raises(SignatureError, match=r"sbom\.cdx\.json wasn't signed"):
        open_bundle(own, verify)
    sign_bundle(own, keys / "ann.key")
    assert open_bundle(own, verify)[0].model == SECOND
    attach(own, "sbom.cdx.json", b"{ }")
    with pytest.raises(SignatureError, match=r"sbom\.cdx\.json isn't what was signed"):
        open_bundle(own, verify)
    assert library_refuses(own, keys / "ann.pub")


# ---------------------------------------------------------------- what was changed


@pytest.mark.parametrize("name", [*SIGNED, "model.sig"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_byte_changed_in_any_file_is_refused_and_the_file_is_named(
    own: Path, keys: Path, verify: Verify, name: str, place: str
) -> None:
    content = bytearray((own / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    (own / name).write_bytes(content)
    with pytest.raises(BundleError) as refused:
        open_bundle(own, verify)
    assert name in str(refused.value)
    assert library_refuses(own, keys / "ann.pub")


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "golden.json", "model.onnx"])
def test_a_file_that_was_changed_with_all_checksums_is_refused_and_named(own: Path, verify: Verify, name: str) -> None:
    rewrite(own, name, (own.parent / FIRST / name).read_bytes() + b" ")
    open_bundle(own)  # sound by its own word
    with pytest.raises(SignatureError) as refused:
        open_bundle(own, verify)
    assert f"{own / name} isn't what was signed" in str(refused.value)
    assert f"{own / 'bundle.json'} isn't what was signed" in str(refused.value)


def test_the_graph_of_another_signed_version_is_refused(own: Path, keys: Path, verify: Verify) -> None:
    rewrite(own, "model.onnx", (own.parent / FIRST / "model.onnx").read_bytes())
    with pytest.raises(SignatureError, match=r"model\.onnx isn't what was signed"):
        open_bundle(own, verify)
    assert library_refuses(own, keys / "ann.pub")


def test_a_manifest_that_says_something_else_is_refused(own: Path, verify: Verify) -> None:
    reseal(own, threshold=0.99)
    assert open_bundle(own)[0].threshold == 0.99
    with pytest.raises(SignatureError, match=r"bundle\.json isn't what was signed"):
        open_bundle(own, verify)


def test_a_file_more_is_refused(own: Path, keys: Path, verify: Verify) -> None:
    (own / "model.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.pkl"):
        open_bundle(own, verify)
    assert library_refuses(own, keys / "ann.pub")


@pytest.mark.parametrize("name", [*SIGNED, "model.sig"])
def test_a_file_less_is_refused_and_named(own: Path, keys: Path, verify: Verify, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(BundleError) as refused:
        open_bundle(own, verify)
    assert name in str(refused.value)
    assert library_refuses(own, keys / "ann.pub")


def test_a_signed_file_that_is_missing_is_named_whatever_the_reader_thinks_of_it(own: Path, keys: Path) -> None:
    contents = {path.name: path.read_bytes() for path in own.iterdir() if path.name != "golden.json"}
    with pytest.raises(SignatureError, match=r"golden\.json is missing"):
        verify_signature(own, contents, read_public_keys(keys / "ann.pub"))


# ---------------------------------------------------------------- what was signed, but not here and now


def test_an_older_signed_bundle_in_the_place_of_a_newer_one_is_refused(own: Path, verify: Verify) -> None:
    shutil.rmtree(own)
    shutil.copytree(own.parent / FIRST, own)
    with pytest.raises(SignatureError, match=rf"bundle\.json is that of {FIRST}"):
        open_bundle(own, verify)


def test_the_signature_of_another_version_is_refused(own: Path, keys: Path, verify: Verify) -> None:
    shutil.copy(own.parent / FIRST / "model.sig", own / "model.sig")
    with pytest.raises(SignatureError, match=f"is the signature of {FIRST}, not of {SECOND}"):
        open_bundle(own, verify)
    assert library_refuses(own, keys / "ann.pub")


def test_an_old_signature_of_the_same_version_is_refused(own: Path, keys: Path, verify: Verify) -> None:
    old = (own / "model.sig").read_bytes()
    attach(own, "sbom.cdx.json", b"{}")
    sign_bundle(own, keys / "ann.key")
    open_bundle(own, verify)
    (own / "model.sig").write_bytes(old)
    with pytest.raises(SignatureError, match=r"sbom\.cdx\.json wasn't signed"):
        open_bundle(own, verify)


def test_a_bundle_is_not_signed_under_another_name(own: Path, keys: Path) -> None:
    shutil.copytree(own, own.with_name("flight-delay@7"))
    with pytest.raises(SignatureError, match=f"is that of {SECOND}"):
        sign_bundle(own.with_name("flight-delay@7"), keys / "ann.key")


# ---------------------------------------------------------------- keys


def test_the_signature_of_another_key_is_refused_and_both_keys_are_named(own: Path, keys: Path, verify: Verify) -> None:
    sign_bundle(own, keys / "eve.key")
    [ann], [eve] = (read_public_keys(keys / f"{name}.pub") for name in ("ann", "eve"))
    with pytest.raises(SignatureError, match=rf"model\.sig is signed with the key {eve[:12]}, trusted is {ann[:12]}"):
        open_bundle(own, verify)
    assert library_refuses(own, keys / "ann.pub")


def test_another_key_under_a_trusted_name_is_refused(own: Path, keys: Path, verify: Verify) -> None:
    sign_bundle(own, keys / "eve.key")
    [ann], [eve] = (read_public_keys(keys / f"{name}.pub") for name in ("ann", "eve"))
    signature = (own / "model.sig").read_text().replace(eve, ann)
    (own / "model.sig").write_text(signature)
    with pytest.raises(SignatureError, match=r"model\.sig was changed after it was signed"):
        open_bundle(own, verify)


def test_a_key_is_replaced_without_a_gap_and_then_the_old_one_counts_no_more(
    own: Path, keys: Path, tmp_path: Path
) -> None:
    new, trusted = make_keys(tmp_path, "new"), tmp_path / "trusted.pem"
    trusted.write_bytes((keys / "ann.pub").read_bytes() + (tmp_path / "new.pub").read_bytes())
    open_bundle(own, signature_verifier(trusted))
    shutil.copy(tmp_path / "new.pub", trusted)
    with pytest.raises(SignatureError, match="is signed with the key"):
        open_bundle(own, signature_verifier(trusted))
    sign_bundle(own, new)
    assert open_bundle(own, signature_verifier(trusted))[0].model == SECOND


@pytest.mark.parametrize(
    "content", [None, b"", b"not a key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"]
)
def test_a_public_key_that_is_absent_or_none_is_refused_and_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "trusted.pem").write_bytes(content)
    with pytest.raises(SignatureError, match=r"trusted\.pem"):
        signature_verifier(tmp_path / "trusted.pem")


def test_a_key_of_another_kind_is_refused(tmp_path: Path, own: Path) -> None:
    key, pem = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "trusted.pem").write_bytes(public)
    with pytest.raises(SignatureError, match="elliptic curve"):
        signature_verifier(tmp_path / "trusted.pem")
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "odd.key").write_bytes(private)
    for work in (lambda: sign_bundle(own, tmp_path / "odd.key"), lambda: seal(b"", tmp_path / "odd.key")):
        with pytest.raises(SignatureError, match=r"odd\.key.*P-256"):
            work()


def test_signing_without_a_key_says_which(own: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match=r"absent\.key"):
        sign_bundle(own, tmp_path / "absent.key")


# ---------------------------------------------------------------- what is not a signature at all


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": {"publicKey": 7}, "dsseEnvelope": {}}', b"[" * 100_000],
)
def test_what_is_not_a_signature_is_refused_and_named(own: Path, verify: Verify, content: bytes) -> None:
    (own / "model.sig").write_bytes(content)
    with pytest.raises(SignatureError, match=r"model\.sig is not a signature"):
        open_bundle(own, verify)


def _other_kind(statement: dict) -> None:
    statement["predicateType"] = "https://slsa.dev/provenance/v1"


def _two_subjects(statement: dict) -> None:
    statement["subject"] *= 2


def _file_twice(statement: dict) -> None:
    statement["predicate"]["resources"] *= 2


def _weak_checksum(statement: dict) -> None:
    statement["predicate"]["resources"][0]["algorithm"] = "md5"


@pytest.mark.parametrize("change", [_other_kind, _two_subjects, _file_twice, _weak_checksum])
def test_a_trusted_signature_over_another_statement_is_not_one_of_a_model(
    own: Path, keys: Path, verify: Verify, change: Callable[[dict], None]
) -> None:
    outer = json.loads((own / "model.sig").read_bytes())
    statement = msgspec.json.decode(msgspec.convert(outer["dsseEnvelope"], Envelope).payload)
    change(statement)
    outer["dsseEnvelope"] = msgspec.to_builtins(seal(msgspec.json.encode(statement), keys / "ann.key"))
    (own / "model.sig").write_bytes(msgspec.json.encode(outer))
    with pytest.raises(SignatureError, match=r"model\.sig"):
        open_bundle(own, verify)


def test_an_envelope_of_another_kind_is_not_opened(keys: Path) -> None:
    trusted = read_public_keys(keys / "ann.pub")
    envelope = seal(b"{}", keys / "ann.key", "text/plain")
    assert unseal(envelope, trusted, "it", kind="text/plain") == b"{}"
    for other in (envelope, msgspec.structs.replace(envelope, payload_type="application/vnd.in-toto+json")):
        with pytest.raises(SignatureError):
            unseal(other, trusted, "it")
    with pytest.raises(SignatureError, match="holds no signed"):
        unseal(msgspec.structs.replace(envelope, signatures=()), trusted, "it", kind="text/plain")


def test_the_bytes_that_are_signed_are_those_of_the_standard(keys: Path) -> None:
    assert signed_bytes("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"  # the example of the specification
    )
    [(name, key)] = read_public_keys(keys / "ann.pub").items()
    assert name == key_name(key)


# ---------------------------------------------------------------- the service


def test_nothing_is_published_that_nobody_trusted_has_signed(
    settings: Settings, own: Path, keys: Path, verify: Verify
) -> None:
    sign_bundle(own, keys / "eve.key")
    with pytest.raises(SignatureError):
        publish(settings, SECOND, verify=verify)
    assert live_bundle(settings) is None
    assert publish(settings, FIRST, verify=verify).name == FIRST


@pytest.mark.parametrize("kind", [LiveModels, ReleaseModels])
def test_a_service_that_verifies_goes_on_with_the_model_that_it_has(
    settings: Settings, own: Path, verify: Verify, kind: Callable[..., LiveModels]
) -> None:
    publish(settings, FIRST)
    models = kind(settings, verify=verify)
    models.refresh()
    assert models.live().predictor.reference == FIRST and not models.problem
    reseal(own, threshold=0.99)
    publish(settings, SECOND)  # by somebody who doesn't verify
    models.refresh()
    assert models.live().predictor.reference == FIRST
    assert "bundle.json isn't what was signed" in models.problem


def test_a_service_that_verifies_never_starts_with_an_unsigned_model(
    settings: Settings, own: Path, verify: Verify
) -> None:
    (own / "model.sig").unlink()
    publish(settings, SECOND)
    models = LiveModels(settings, verify=verify)
    models.refresh()
    assert not models.ready and "isn't signed" in models.problem


def test_a_live_file_that_was_put_back_is_refused(settings: Settings, verify: Verify) -> None:
    publish(settings, FIRST)
    older = live_file(settings, FIRST).read_bytes()
    publish(settings, SECOND)
    models = LiveModels(settings, patience=0, verify=verify)
    models.refresh()
    live_file(settings, FIRST).write_bytes(older)
    models.refresh()
    assert models.live().predictor.reference == SECOND
    assert "isn't what was published last" in models.problem and "live.json" in models.problem
    with pytest.raises(BundleError, match="isn't what was published last"):
        require_published_last(settings, FIRST)
    publish(settings, FIRST, "on purpose")  # going back in good order is allowed
    publish(settings, SECOND)
    publish(settings, FIRST, "on purpose")
    models.refresh()
    assert models.live().predictor.reference == FIRST and not models.problem


def test_a_signature_travels_with_its_bundle(settings: Settings, own: Path, tmp_path: Path, verify: Verify) -> None:
    elsewhere = shutil.copytree(own, tmp_path / "elsewhere" / SECOND)
    other = settings_in(tmp_path / "other")
    open_bundle(publish(other, elsewhere, verify=verify), verify)
    assert list(read_attestations(bundles_folder(other) / SECOND)) == [ATTESTATIONS[-1]]


def test_packaging_the_same_model_again_keeps_its_signature(settings: Settings, own: Path, verify: Verify) -> None:
    publish(settings, own)
    open_bundle(own, verify)


def test_a_candidate_that_was_changed_answers_nobody(settings: Settings, own: Path, verify: Verify) -> None:
    publish(settings, FIRST)
    start_release(settings, SECOND)
    honest = ReleaseModels(settings, verify)
    honest.router.follow(settings, honest.choice)
    honest.refresh()
    assert honest.router.route is not None and honest.router.route.candidate.predictor.reference == SECOND
    reseal(own, threshold=0.3)
    models = ReleaseModels(settings, verify)
    models.refresh()
    assert models.router.route is None and models.live().predictor.reference == FIRST
