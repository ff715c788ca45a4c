"""What went into a model, how it was made, and who says so: lists that others read, statements about these files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
import typer
from bundle_helpers import rewrite
from conftest import settings_in
from deltalake import write_deltalake
from fastapi.testclient import TestClient
from service_helpers import Running, serving, until
from typer.testing import CliRunner

from mlops_course.capstone.production import production_app
from mlops_course.commands import as_group
from mlops_course.commands.models import models_commands
from mlops_course.commands.release import release_commands
from mlops_course.commands.serve import app_of, serve_app
from mlops_course.deployment.release_files import read_release
from mlops_course.environment import Settings, fingerprint
from mlops_course.experiments import TrainingConfig, train
from mlops_course.ledger import LedgerEntry, append_entry
from mlops_course.project import flight_delay
from mlops_course.registry import RegistryError
from mlops_course.security import sbom as sbom_module
from mlops_course.security import vouching
from mlops_course.security.envelopes import SignatureError, read_public_keys
from mlops_course.security.provenance import (
    make_provenance,
    materials,
    missing_materials,
    sign_provenance,
    verify_provenance,
)
from mlops_course.security.sbom import card_figures, list_packages, make_sbom, require_sbom, table_digest, uses
from mlops_course.security.signing import sign_bundle, signed_app, trusted, trusted_if_any
from mlops_course.security.signing_key import SigningKeyError, signing_key_file, verifying_key_file
from mlops_course.security.vouching import check_vouched, ensure_vouched, run_parameters, vouch, voucher
from mlops_course.serving.bundle import (
    ATTESTATIONS,
    BundleError,
    bundles_folder,
    manifest_sha256,
    open_bundle,
    place_bundle,
    read_attestations,
)
from mlops_course.serving.packaging import Origin, write_bundle
from mlops_course.serving.publishing import for_case, live_bundle, live_file, publish
from mlops_course.serving.server import ServeError

NAME, FEATURES = "flight-delay@1", "flight-delay/features@0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a table and a small model that somebody vouches for; the keys are beside it."""
    folder = tmp_path_factory.mktemp("vouched")
    settings = with_keys(folder)
    draw = np.random.default_rng(2013)
    rows = pd.DataFrame({name: draw.choice(["AA", "UA"], 500) for name in flight_delay.categorical})
    rows["wind_speed"] = (draw.random(500) * 40).astype(np.float32)
    rows["label"] = (rows["wind_speed"] > 25).astype(float)
    write_deltalake(str(settings.data / "flight-delay" / "features"), rows)
    model = train(rows, flight_delay, TrainingConfig(iterations=3, leaf_samples=50))
    metrics = {"test.pr_auc": 0.5512, "test.log_loss": 0.4317}
    origin = Origin(run_id="5e43e4af", data={"features": FEATURES}, first="2013-01", last="2013-02", metrics=metrics)
    vouch(settings, write_bundle(settings, flight_delay, model, rows, NAME, origin), {"iterations": 3}, "ann")
    return folder


def with_keys(folder: Path) -> Settings:
    """Settings of a workspace with its keys beside it."""
    return settings_in(folder / "workspace").model_copy(update={"trust": folder / "trust"})


@pytest.fixture
def settings(made: Path, tmp_path: Path) -> Settings:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return with_keys(tmp_path)


@pytest.fixture
def own(settings: Settings) -> Path:
    return bundles_folder(settings) / NAME


@pytest.fixture
def sbom(own: Path) -> dict[str, Any]:
    return json.loads((own / "sbom.cdx.json").read_bytes())


# ---------------------------------------------------------------- the list


def test_the_list_names_every_installed_package_with_its_version(sbom: dict[str, Any], own: Path) -> None:
    listed = {each["name"]: each["version"] for each in sbom["components"] if each["type"] == "library"}
    for name, version in fingerprint()["packages"].items():
        if version is not None:
            assert listed[name] == version
    assert len(listed) == len({each["name"] for each in list_packages()})
    content = (own / "sbom.cdx.json").read_bytes()
    assert uses(content, "scikit_learn") == listed["scikit-learn"] and uses(content, "log4j") is None


def test_most_packages_have_a_licence_and_no_licence_is_a_whole_text(sbom: dict[str, Any]) -> None:
    libraries = [each for each in sbom["components"] if each["type"] == "library"]
    assert sum("licenses" in each for each in libraries) > 0.9 * len(libraries)
    names = [
        part["license"].get("name", "") for each in libraries for part in each.get("licenses", []) if "license" in part
    ]
    assert max(map(len, names)) < 120


def test_the_list_knows_the_model_its_figures_and_its_table(
    sbom: dict[str, Any], settings: Settings, own: Path
) -> None:
    model = sbom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "flight-delay", "1")
    assert model["hashes"][0]["content"] == open_bundle(own)[0].files["model.onnx"]
    figures = {
        each["type"]: float(each["value"]) for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert figures == {"pr_auc": 0.5512, "log_loss": 0.4317}
    [table] = [each for each in sbom["components"] if each["type"] == "data"]
    assert table["bom-ref"] == f"data:{FEATURES}" == model["modelCard"]["modelParameters"]["datasets"][0]["ref"]
    assert table["hashes"] == [{"alg": "SHA-256", "content": table_digest(settings, FEATURES)}]
    [needs] = sbom["dependencies"]
    assert set(needs["dependsOn"]) == {each["bom-ref"] for each in sbom["components"]}


def test_the_same_bundle_gives_the_same_list(settings: Settings, own: Path) -> None:
    assert make_sbom(settings, *open_bundle(own)) == (own / "sbom.cdx.json").read_bytes()


def test_a_figure_of_the_card_that_is_negative_or_without_a_bar_is_read() -> None:
    assert card_figures("| figure | measured | bar |\n|---|---|---|\n| gain | -0.2000 |  |\n| auc | 0.7 | 0.6 |\n") == {
        "gain": "-0.2000", "auc": "0.7",
    }  # fmt: skip


def _misspelt(about: dict[str, Any]) -> None:
    about["compnents"] = about.pop("components")


def _no_version(about: dict[str, Any]) -> None:
    del about["metadata"]["component"]["name"]


def _unknown_kind(about: dict[str, Any]) -> None:
    about["components"][0]["type"] = "model"


def _twice(about: dict[str, Any]) -> None:
    about["components"].append(about["components"][0])


@pytest.mark.parametrize("change", [_misspelt, _no_version, _unknown_kind, _twice])
def test_a_list_that_scanners_would_not_read_is_refused(sbom: dict[str, Any], change: Callable[[dict], None]) -> None:
    require_sbom(json.dumps(sbom).encode())
    change(sbom)
    with pytest.raises(BundleError, match=r"not valid CycloneDX 1\.6"):
        require_sbom(json.dumps(sbom).encode())


# ---------------------------------------------------------------- the data


def test_a_version_of_a_table_has_one_digest_and_any_other_content_another(settings: Settings) -> None:
    digest = table_digest(settings, FEATURES)
    write_deltalake(
        str(settings.data / "flight-delay" / "features"),
        pd.DataFrame({"label": [1.0]}),
        mode="append",
        schema_mode="merge",
    )
    assert table_digest(settings, FEATURES) == digest != table_digest(settings, "flight-delay/features@1")
    for path in (settings.data / "flight-delay" / "features").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert table_digest(settings, FEATURES) != digest


@pytest.mark.parametrize("reference", ["flight-delay/features@7", "flight-delay/nothing@0"])
def test_a_version_that_is_not_here_has_no_digest(settings: Settings, reference: str) -> None:
    assert table_digest(settings, reference) is None


# ---------------------------------------------------------------- the statement


def statement_of(settings: Settings, own: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    contents = {path.name: path.read_bytes() for path in own.iterdir()}
    keys = read_public_keys(verifying_key_file(settings))
    return verify_provenance(contents["provenance.json"], contents, keys), contents


def test_the_statement_is_about_every_file_but_itself_and_the_signature(settings: Settings, own: Path) -> None:
    statement, contents = statement_of(settings, own)
    assert {each["name"] for each in statement["subject"]} == set(contents) - {"provenance.json", "model.sig"}
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["predicate"]["buildDefinition"]["externalParameters"]["iterations"] == 3
    assert statement["predicate"]["runDetails"]["builder"]["id"].endswith(":ann")
    assert statement["predicate"]["runDetails"]["metadata"]["invocationId"] == "5e43e4af"


def test_who_made_a_model_and_when_is_as_the_ledger_has_it_and_not_as_it_is_signed(
    settings: Settings, own: Path
) -> None:
    assert "finishedOn" not in statement_of(settings, own)[0]["predicate"]["runDetails"]["metadata"]
    made = LedgerEntry(event="register", use_case="flight-delay", subject=NAME, by="dora", reason="new", after={})
    line = append_entry(settings, made)
    vouch(settings, own, by="bob")
    run = statement_of(settings, own)[0]["predicate"]["runDetails"]
    assert (run["builder"]["id"].rpartition(":")[2], run["metadata"]["finishedOn"]) == ("dora", line.time)
    found = check_vouched(settings, own)
    assert (found["by"], found["made"]) == ("bob", line.time) and found["on"]


def test_the_list_says_that_its_packages_are_those_where_it_was_signed(sbom: dict[str, Any]) -> None:
    assert {"name": "environment", "value": "signing"} in sbom["metadata"]["properties"]


def test_the_statement_names_data_code_and_lock_with_their_digests(settings: Settings, own: Path) -> None:
    manifest = open_bundle(own)[0]
    found = {each["name"]: each for each in materials(settings, manifest)}
    assert found["features"]["digest"]["sha256"] == table_digest(settings, FEATURES)
    assert found["packages"]["digest"]["sha256"] == manifest.fingerprint["lock"]
    assert found["code"]["digest"]["gitCommit"] == manifest.fingerprint["commit"]


def test_a_bundle_of_an_unknown_place_states_what_it_knows(settings: Settings, own: Path) -> None:
    manifest = msgspec.structs.replace(open_bundle(own)[0], fingerprint={}, data={"features": "elsewhere/features@3"})
    assert materials(settings, manifest) == [{"name": "features", "uri": "table:elsewhere/features@3"}]


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "bundle.json", "golden.json", "model.onnx", "sbom.cdx.json"])
def test_a_statement_about_another_file_is_refused_and_the_file_is_named(
    settings: Settings, own: Path, name: str
) -> None:
    _, contents = statement_of(settings, own)
    keys = read_public_keys(verifying_key_file(settings))
    for other in (contents | {name: b"{}"}, {each: contents[each] for each in contents if each != name}):
        with pytest.raises(SignatureError, match=f"is about another {name}"):
            verify_provenance(contents["provenance.json"], other, keys)


def test_a_statement_that_anybody_else_has_signed_or_changed_is_refused(
    settings: Settings, own: Path, tmp_path: Path
) -> None:
    statement, contents = statement_of(settings, own)
    keys = read_public_keys(verifying_key_file(settings))
    eve = signing_key_file(settings.model_copy(update={"trust": tmp_path / "eve"}))
    forged = json.loads(contents["provenance.json"])
    forged["payload"] = msgspec.to_builtins(msgspec.json.encode(statement | {"x": 1}))
    for content in (sign_provenance(statement, eve), json.dumps(forged).encode(), b"", b"{}", b"[" * 100_000):
        with pytest.raises(SignatureError, match=r"provenance\.json"):
            verify_provenance(content, contents, keys)


@pytest.mark.parametrize(
    "change", [{"predicateType": "https://slsa.dev/provenance/v0.2"}, {"_type": "x"}, {"subject": [{}]}]
)
def test_a_signed_statement_of_another_kind_is_refused(settings: Settings, own: Path, change: dict[str, Any]) -> None:
    statement, contents = statement_of(settings, own)
    signed = sign_provenance(statement | change, signing_key_file(settings))
    with pytest.raises(SignatureError, match=r"provenance\.json"):
        verify_provenance(signed, contents, read_public_keys(verifying_key_file(settings)))


def test_materials_that_are_gone_or_others_are_named(settings: Settings, own: Path) -> None:
    statement, _ = statement_of(settings, own)
    assert missing_materials(settings, statement) == []
    [path] = (settings.data / "flight-delay" / "features").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "has the digest" in missing_materials(settings, statement)[0]
    path.unlink()
    assert missing_materials(settings, statement) == [f"{FEATURES} isn't here"]


# ---------------------------------------------------------------- all together


def test_what_is_vouched_for_is_taken_and_told(settings: Settings, own: Path) -> None:
    assert open_bundle(own, trusted(settings))[0].model == NAME
    found = check_vouched(settings, own)
    assert found["signed"] and found["by"] == "ann" and found["missing"] == [] and found["problems"] == []


def test_vouching_again_is_the_same_as_once(settings: Settings, own: Path) -> None:
    before = (own / "sbom.cdx.json").read_bytes()
    vouch(settings, own, by="bob")
    assert (own / "sbom.cdx.json").read_bytes() == before
    assert check_vouched(settings, own)["by"] == "bob"
    publish(settings, NAME, verify=trusted(settings))


@pytest.mark.parametrize("name", ["model.sig", "provenance.json", "sbom.cdx.json"])
def test_what_lacks_one_of_the_three_is_told(settings: Settings, own: Path, name: str) -> None:
    (own / name).unlink()
    found = check_vouched(settings, own)
    assert not found["signed"] and name in found["problems"][0]


def test_a_damaged_bundle_is_not_vouched_for(settings: Settings, own: Path) -> None:
    (own / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.onnx is damaged"):
        vouch(settings, own)


def test_nobody_vouches_for_a_change_by_accident(settings: Settings, own: Path) -> None:
    rewrite(own, "MODEL_CARD.md", b"# perfect")
    found = check_vouched(settings, own)
    assert not found["signed"] and "MODEL_CARD.md isn't what was signed" in found["problems"][0]


def test_a_statement_without_parameters_says_what_the_bundle_knows(settings: Settings, own: Path) -> None:
    manifest, files = open_bundle(own)
    asked = make_provenance(settings, manifest, files)["predicate"]["buildDefinition"]["externalParameters"]
    assert asked == {"model": NAME, "first": "2013-01", "last": "2013-02"}


# ---------------------------------------------------------------- service and command line


def test_a_service_that_takes_signed_models_only_does_not_start_without_a_key(
    settings: Settings, tmp_path: Path
) -> None:
    signed_app(settings)
    with pytest.raises(SigningKeyError, match="verify with"):
        signed_app(settings.model_copy(update={"trust": tmp_path / "nobody"}))


def test_without_a_store_of_runs_the_parameters_are_not_known_and_none_is_made(settings: Settings) -> None:
    assert run_parameters(settings, flight_delay, "5e43e4af") is None
    assert not (settings.home / "mlflow.db").exists()


def command(settings: Settings, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a command of `mlops-course models`."""
    environment = {"MLOPS_COURSE_TRUST": str(settings.trust)}
    options = ["--home", str(settings.home), "--json"]
    done = CliRunner().invoke(as_group(models_commands), [*words, *options], env=environment)
    return done.exit_code, json.loads(done.output)


def test_the_commands_sign_and_verify_and_their_exit_status_tells(settings: Settings, own: Path) -> None:
    for name in ("model.sig", "sbom.cdx.json", "provenance.json"):
        (own / name).unlink()
    status, told = command(settings, "verify", NAME)
    assert (status, told["signed"]) == (1, False) and "isn't signed" in told["problems"][0]
    status, told = command(settings, "sign", NAME, "--by", "cleo")
    assert (status, told["signed"]) == (0, NAME)
    status, told = command(settings, "verify", NAME)
    assert (status, told["signed"], told["by"], told["problems"]) == (0, True, "cleo", [])
    rewrite(own, "MODEL_CARD.md", b"# perfect")
    status, told = command(settings, "verify", NAME)
    assert status == 1 and "MODEL_CARD.md" in told["problems"][0]


@pytest.mark.parametrize("word", ["sign", "verify", "log-bundle"])
def test_an_alias_is_a_version_and_never_a_folder(settings: Settings, word: str) -> None:
    done = CliRunner().invoke(as_group(models_commands), [word, "champion", "--home", str(settings.home)])
    assert isinstance(done.exception, RegistryError) and "no model 'champion'" in str(done.exception)


@pytest.fixture
def two(settings: Settings, own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two versions are signed, and the second one is live; programs know the key that is trusted."""
    monkeypatch.setenv("MLOPS_COURSE_TRUST", str(settings.trust))
    other = own.with_name("flight-delay@2")
    manifest, files = open_bundle(own)
    place_bundle(other, msgspec.structs.replace(manifest, model=other.name), files)
    vouch(settings, other)
    publish(settings, NAME, verify=trusted(settings))
    publish(settings, other.name, verify=trusted(settings))
    return other


@contextmanager
def put_back(settings: Settings, *paths: Path) -> Iterator[None]:
    """What is in a bundle, in the ledger and in `live.json` is as it was afterwards, to the last byte."""
    kept = {path: path.read_bytes() for path in (*paths, settings.ledger, live_file(settings, NAME))}
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def refuses(running: Running, said: str) -> bool:
    """Have the service look again; whether it says so, and answers nobody."""
    os.utime(live_file(running.settings, NAME))
    until(lambda: said in running.client.get("/health/ready").text)
    return {running.client.get("/health/ready").status_code, running.ask(record={}).status_code} == {503}


def test_a_service_takes_only_what_the_trusted_key_has_signed_and_names_the_file(
    settings: Settings, two: Path, tmp_path: Path
) -> None:
    """As everybody starts it, in a process of its own; somebody who can write the workspace tries this and that."""
    live, first, files = live_file(settings, NAME), bundles_folder(settings) / NAME, sorted(two.iterdir())
    stranger = signing_key_file(settings.model_copy(update={"trust": tmp_path / "eve"}))
    assert len(files) == 7, "all of them are tried"
    whole = live.read_bytes()
    live.write_bytes(msgspec.json.encode({"bundle": NAME, "manifest": manifest_sha256(first)}))
    with serving(settings.home, ready=False) as running:
        assert refuses(running, "live.json isn't what was published last"), "an older one, as if it were still live"
        live.write_bytes(whole)
        for path in files:
            with put_back(settings, path):
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
                assert refuses(running, f"{two.name}/{path.name}"), "one byte was changed"
        with put_back(settings, two / "model.sig"):
            (two / "model.sig").unlink()
            assert refuses(running, "isn't signed") and refuses(running, f"mlops-course models sign {two.name}")
        with put_back(settings, two / "model.sig"):
            sign_bundle(two, stranger)
            assert refuses(running, "model.sig is signed with the key")
        with put_back(settings, *files):
            for path in files:
                path.write_bytes((first / path.name).read_bytes())
            said = {"live": two.name, "manifest": manifest_sha256(first)}
            line = {"event": "publish", "use_case": "flight-delay", "subject": two.name, "by": "eve", "reason": "none"}
            append_entry(settings, LedgerEntry(**line, after=said))
            live.write_bytes(msgspec.json.encode({"bundle": two.name, "manifest": said["manifest"]}))
            assert refuses(running, f"{two.name}/bundle.json is that of {NAME}"), "an older one under a newer name"
        os.utime(live)
        running.wait_ready()
        assert running.client.get("/model").json()["model"] == two.name


def test_a_running_service_refuses_what_was_changed_and_goes_on_with_what_was_signed(
    settings: Settings, two: Path
) -> None:
    """The third version is honest, then changed by one who knows the format."""
    manifest, files = open_bundle(two)
    third = place_bundle(
        two.with_name("flight-delay@3"), msgspec.structs.replace(manifest, model="flight-delay@3"), files
    )
    vouch(settings, third)
    with serving(settings.home, "--app", "mlops_course.deployment:release_app") as running:
        assert running.client.get("/model").json()["model"] == two.name
        rewrite(third, "MODEL_CARD.md", b"# perfect")
        publish(settings, third.name)  # by somebody who doesn't verify
        until(lambda: "MODEL_CARD.md isn't what was signed" in running.client.get("/health/ready").text)
        assert running.client.get("/model").json()["model"] == two.name


def test_somebody_may_decide_to_serve_what_nobody_has_signed_and_is_warned(settings: Settings, two: Path) -> None:
    (two / "model.sig").unlink()
    with serving(settings.home, "--unsigned", "--json") as running:
        assert running.client.get("/model").json()["model"] == two.name
        running.stop()
        [warning] = [line for line in running.errors().splitlines() if "signatures aren't asked for" in line]
        assert json.loads(warning)["event"] == "warning"


def told(settings: Settings, *words: str) -> tuple[int, str]:
    """Exit status of a command, and what a person reads."""
    program = typer.Typer(pretty_exceptions_enable=False)
    program.add_typer(serve_app)
    program.add_typer(release_commands, name="release")
    environment = {"MLOPS_COURSE_TRUST": str(settings.trust)}
    done = CliRunner().invoke(as_group(program), [*words, "--home", str(settings.home)], env=environment)
    return done.exit_code, f"{done.output}{done.exception or ''}"


def test_nothing_unsigned_is_published_or_released_where_a_key_is_trusted(settings: Settings, two: Path) -> None:
    publish(settings, NAME)
    (two / "model.sig").rename(settings.home / "model.sig")
    for words in (["publish", two.name], ["publish", two.name, "--signed"], ["release", "start", two.name]):
        status, said = told(settings, *words)
        assert status == 1 and f"{two.name}/model.sig" in said and f"mlops-course models sign {two.name}" in said
    assert live_bundle(settings) == two.with_name(NAME) and read_release(for_case(settings, NAME)) is None
    status, said = told(settings, "publish", two.name, "--unsigned")
    assert status == 0 and said.count("warning: signatures aren't asked for") == 1
    publish(settings, NAME)
    (settings.home / "model.sig").rename(two / "model.sig")
    assert told(settings, "release", "start", two.name)[0] == 0


def test_without_a_key_nothing_is_verified_unless_somebody_asks_for_it(settings: Settings, own: Path) -> None:
    (own / "model.sig").unlink()
    keyless = settings.model_copy(update={"trust": settings.trust / "nobody"})
    assert told(keyless, "publish", NAME) == (0, f"{NAME} is live\n")
    for words in (["publish", NAME], ["serve"], ["inbox", str(settings.home / "inbox"), "--once"]):
        status, said = told(keyless, *words, "--signed")
        assert status == 1 and "verifying_key.pem to verify with" in said and "Copy it" in said


def test_half_a_pair_of_keys_or_one_in_the_workspace_opens_nothing(settings: Settings) -> None:
    inside = settings.model_copy(update={"trust": shutil.copytree(settings.trust, settings.home / "trust")})
    with pytest.raises(SigningKeyError, match="lies inside the workspace"):
        trusted_if_any(inside)
    verifying_key_file(settings).unlink()
    with pytest.raises(SigningKeyError, match="to verify with"):
        trusted_if_any(settings)
    assert trusted_if_any(settings, signed=False) is None


def test_an_app_of_somebody_else_decides_itself(settings: Settings) -> None:
    assert app_of(settings, "mine.app:make", None) == "mine.app:make"
    for signed in (True, False):
        with pytest.raises(ServeError, match="decides itself"):
            app_of(settings, "mine.app:make", signed)


def test_production_asks_for_signatures_where_a_key_is_trusted(settings: Settings, two: Path) -> None:
    (two / "model.sig").unlink()
    with TestClient(production_app(settings)) as client:
        ready = client.get("/health/ready")
    assert ready.status_code == 503 and f"mlops-course models sign {two.name}" in ready.text


# ---------------------------------------------------------------- who signs without being asked


def test_what_nobody_has_signed_is_signed_once(settings: Settings, own: Path) -> None:
    for name in ATTESTATIONS:
        (own / name).unlink()
    attest = voucher(flight_delay, "ben")
    assert attest(settings, own) and check_vouched(settings, own)["by"] == "ben"
    before = read_attestations(own)
    assert not attest(settings, own) and read_attestations(own) == before
    (own / "sbom.cdx.json").unlink()
    with pytest.raises(SignatureError, match=r"sbom\.cdx\.json is missing"):
        attest(settings, own)


def test_what_was_changed_or_comes_from_a_stranger_is_not_signed_by_a_program(
    settings: Settings, own: Path, tmp_path: Path
) -> None:
    rewrite(own, "MODEL_CARD.md", b"# perfect")
    with pytest.raises(SignatureError, match=r"MODEL_CARD\.md isn't what was signed"):
        ensure_vouched(settings, flight_delay, own)
    stranger = settings.model_copy(update={"trust": tmp_path / "eve"})
    assert not ensure_vouched(stranger, flight_delay, own), "who trusts nobody can't say anything about it"
    assert not stranger.trust.exists()
    signing_key_file(stranger)
    with pytest.raises(SignatureError, match="is signed with the key"):
        ensure_vouched(stranger, flight_delay, own)


def test_an_installation_that_can_t_sign_says_what_it_lacks(
    settings: Settings, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "model.sig").unlink()
    monkeypatch.setattr(vouching, "find_spec", lambda name: None)
    with pytest.raises(SignatureError, match="can't be signed here, without cryptography and model-signing"):
        ensure_vouched(settings, flight_delay, own)


def test_no_table_is_read_twice_to_vouch_for_a_model(
    settings: Settings, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = open_bundle(own)
    rows = {"features": FEATURES, "rows": FEATURES, "other": "elsewhere/features@3"}
    other = own.with_name("flight-delay@2")
    place_bundle(other, msgspec.structs.replace(manifest, model=other.name, data=rows), files)
    asked, digest = [], sbom_module.table_digest
    monkeypatch.setattr(sbom_module, "table_digest", lambda where, name: asked.append(name) or digest(where, name))
    vouch(settings, other)
    assert sorted(asked) == ["elsewhere/features@3", FEATURES]
    assert check_vouched(settings, other)["missing"] == ["elsewhere/features@3 isn't here"]


_BARE = """
import sys
absent = {"pandas", "sklearn", "scipy", "mlflow", "deltalake", "pyarrow", "matplotlib", "cyclonedx", "skl2onnx"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from mlops_course.environment import load_settings
from mlops_course.security.signing import signed_app
signed_app(load_settings())
print("model_signing" in sys.modules)
"""


def test_a_service_needs_nothing_to_verify_that_its_image_lacks(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_COURSE_TRUST", str(settings.trust))
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(settings.home))
    done = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_packages_of_another_lock_than_the_bundle_s_are_not_listed(settings: Settings, own: Path) -> None:
    manifest, files = open_bundle(own)
    now = fingerprint()["lock"]
    assert now and manifest.fingerprint["lock"] == now
    other = msgspec.structs.replace(manifest, fingerprint={**manifest.fingerprint, "lock": "ab" * 32})
    with pytest.raises(BundleError) as refused:
        make_sbom(settings, other, files)
    assert "ab" * 32 in str(refused.value) and now in str(refused.value)
    unknown = msgspec.structs.replace(manifest, fingerprint={**manifest.fingerprint, "lock": None})
    assert require_sbom(make_sbom(settings, unknown, files))
