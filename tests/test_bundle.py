"""The model bundle: it says what scikit-learn says, it is whole or refused, and nothing in it is ever run."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pandas as pd
import pytest
import registry_helpers
from bundle_helpers import reseal, rewrite
from conftest import Quarter, settings_in
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sklearn.pipeline import Pipeline

from mlops_course.data import build_features, ingest, labelled_features, validate
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.ledger import read_ledger
from mlops_course.project import flight_delay
from mlops_course.serving import load_predictor, packaging
from mlops_course.serving.bundle import BundleError, bundles_folder, read_bundle
from mlops_course.serving.packaging import Origin, write_bundle
from mlops_course.serving.publishing import check_live, live_bundle, publish, repair_live

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

FILES = ["MODEL_CARD.md", "bundle.json", "golden.json", "model.onnx"]
ORIGIN = Origin(
    run_id="5e43e4af", data={"features": "features@4", "rows": "flights@5"}, first="2013-01", last="2013-02",
    metrics={"test.pr_auc": 0.55, "test.roc_auc": 0.78, "test.log_loss": 0.43, "train.base_rate": 0.23},
    tested="2013-03 to 2013-03",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(quarter: Quarter) -> pd.DataFrame:
    return quarter.labelled("2013-01", "2013-02")


@pytest.fixture(scope="module")
def model(rows: pd.DataFrame) -> Pipeline:
    """Many small leaves: thresholds between all kinds of neighbouring values."""
    return train(rows, flight_delay, TrainingConfig(60, leaf_samples=5))


@pytest.fixture(scope="module")
def made(model: Pipeline, rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test changes."""
    settings = settings_in(tmp_path_factory.mktemp("made"))
    return write_bundle(settings, flight_delay, model, rows, "flight-delay@3", ORIGIN)


@pytest.fixture
def own(made: Path, settings: Settings) -> Path:
    """One that the test may spoil, in the test's workspace."""
    return Path(shutil.copytree(made, bundles_folder(settings) / made.name))


# ---------------------------------------------------------------- it says what scikit-learn says


def test_every_flight_of_another_month_gets_the_score_and_decision_of_scikit_learn(
    quarter: Quarter, model: Pipeline, made: Path
) -> None:
    march, predictor = quarter.labelled("2013-03"), load_predictor(made)
    wanted, found = scores(model, march), predictor.scores(predictor.encode_frame(march))
    assert np.abs(wanted - found).max() < 1e-5
    np.testing.assert_array_equal(found >= predictor.threshold, wanted >= predictor.threshold)
    assert 0 < (found >= predictor.threshold).mean() < 1


@pytest.mark.slow
def test_all_flights_of_a_month_and_a_model_of_all_flights_of_another(tmp_path: Path) -> None:
    settings, periods = settings_in(tmp_path), ["2013-01", "2013-02"]
    for month in periods:
        delivery = ingest(settings, flight_delay, month)
    clean = validate(settings, flight_delay, delivery.tables, periods).tables
    features = build_features(settings, flight_delay, clean, *periods)
    january, february = (labelled_features(settings, flight_delay, features, clean["flights"], m, m) for m in periods)
    trained = train(january, flight_delay)
    predictor = load_predictor(write_bundle(settings, flight_delay, trained, january, "flight-delay@1", ORIGIN))
    for month in (january, february):
        wanted, found = scores(trained, month), predictor.scores(predictor.encode_frame(month))
        assert np.abs(wanted - found).max() < 1e-5
        assert ((found >= predictor.threshold) != (wanted >= predictor.threshold)).sum() == 0
    assert len(february) > 23_000


def test_the_encoding_is_that_of_the_training_to_the_last_bit(quarter: Quarter, model: Pipeline, made: Path) -> None:
    march = quarter.labelled("2013-03")
    march.loc[march.index[::7], "carrier"] = "??"
    wanted = model[:-1].transform(march[list(model.feature_names_in_)]).astype(np.float32)
    np.testing.assert_array_equal(load_predictor(made).encode_frame(march), wanted)


@examples(deadline=None, max_examples=300)
@given(
    low=st.floats(width=32, allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 3),
    share=st.floats(0, 1),
    other=st.floats(width=32, allow_nan=False),
)
def test_rounding_down_keeps_every_comparison(low: float, steps: int, share: float, other: float) -> None:
    high = np.float32(low)
    for _ in range(steps):
        high = np.nextafter(high, np.float32(np.finfo(np.float32).max))
    threshold = np.array([(1 - share) * float(low) + share * float(high)])
    rounded = packaging._round_down(threshold)[0]
    for value in (np.float32(low), high, np.float32(other)):
        assert (value <= rounded) == (float(value) <= threshold[0])


def test_a_graph_that_differs_is_refused_and_leaves_nothing(
    model: Pipeline, rows: pd.DataFrame, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = packaging.convert_to_onnx(train(rows, flight_delay, TrainingConfig(61, leaf_samples=5)))
    monkeypatch.setattr(packaging, "convert_to_onnx", lambda model: other)
    words = r"flight-delay@3 differs from scikit-learn by up to .* in \d+ of \d+ decisions"
    with pytest.raises(BundleError, match=words):
        write_bundle(settings, flight_delay, model, rows, "flight-delay@3", ORIGIN)
    assert not bundles_folder(settings).exists()


def test_rounding_to_the_nearest_would_have_been_refused(
    model: Pipeline, rows: pd.DataFrame, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap is real: with these trees, the usual conversion scores some flights differently."""
    monkeypatch.setattr(packaging, "_round_down", lambda thresholds: thresholds)
    with pytest.raises(BundleError, match="differs from scikit-learn"):
        write_bundle(settings, flight_delay, model, rows, "flight-delay@3", ORIGIN)


# ---------------------------------------------------------------- what is in it


def test_it_is_four_files_and_the_manifest_has_their_checksums(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == FILES
    sums = {name: hashlib.sha256((made / name).read_bytes()).hexdigest() for name in FILES if name != "bundle.json"}
    assert read_bundle(made).files == sums


def test_the_manifest_knows_the_model_its_inputs_and_where_it_comes_from(
    made: Path, model: Pipeline, rows: pd.DataFrame
) -> None:
    manifest = read_bundle(made)
    assert (manifest.format, manifest.model, manifest.run_id) == (2, "flight-delay@3", "5e43e4af")
    assert (manifest.first, manifest.last, manifest.data) == ("2013-01", "2013-02", ORIGIN.data)
    assert [feature.name for feature in manifest.features] == list(model.feature_names_in_)
    texts = {feature.name: list(feature.categories) for feature in manifest.features if feature.kind == "category"}
    encoder = model.named_steps["columns"].transformers_[0][1]
    assert texts == dict(zip(flight_delay.categorical, map(list, encoder.categories_), strict=True))
    assert manifest.threshold == flight_delay.costs.threshold
    assert (manifest.horizon_minutes, manifest.key, manifest.time) == (120, flight_delay.key, "scheduled_departure")
    assert {"commit", "python", "packages"} <= set(manifest.fingerprint)
    typical = {feature.name: feature.typical for feature in manifest.features}
    assert typical["carrier"] == rows["carrier"].mode()[0]
    assert typical["distance"] == rows["distance"].median()
    assert typical["wind_gust"] is None, "it is mostly missing, so missing is typical"


def test_each_feature_of_the_flights_belongs_to_a_group(made: Path) -> None:
    groups = {feature.name: feature.group for feature in read_bundle(made).features}
    assert "" not in groups.values()
    assert len(set(groups.values())) == len({name for name, _ in flight_delay.groups})
    assert groups["previous_leg_1_delay"] == groups["previous_leg_2_state"] == "the aircraft's previous flights"
    assert groups["departure_delay_origin_carrier_2h"] != groups["departure_delay_origin_2h"]


def test_the_same_model_gives_the_same_bytes(
    made: Path, model: Pipeline, rows: pd.DataFrame, settings: Settings
) -> None:
    again = write_bundle(settings, flight_delay, model, rows, "flight-delay@3", ORIGIN)
    assert {name: (again / name).read_bytes() for name in FILES} == {n: (made / n).read_bytes() for n in FILES}
    assert not list(again.parent.glob(".*")), "nothing is left beside it"


def test_writing_it_again_replaces_a_damaged_one(
    own: Path, model: Pipeline, rows: pd.DataFrame, settings: Settings
) -> None:
    (own / "model.onnx").write_bytes(b"")
    assert read_bundle(write_bundle(settings, flight_delay, model, rows, own.name, ORIGIN)).model == own.name


def test_the_card_has_the_figures_of_the_run_and_its_limits(made: Path) -> None:
    card = (made / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in (
        "# Model card: flight-delay@3", flight_delay.question, "2013-01 to 2013-02", "features `features@4`",
        "| pr_auc | 0.5500 | 0.56 |", "Tested on 2013-03 to 2013-03", "misses a bar: pr_auc is 0.5500, below 0.56",
        "114 numbers and 3 categories", "2 hours before", "0.2667", "5e43e4af",
    ):  # fmt: skip
        assert words in card
    assert "base_rate" not in card


def test_the_card_of_a_model_that_was_never_tested_says_so(
    model: Pipeline, rows: pd.DataFrame, settings: Settings
) -> None:
    bare = msgspec.structs.replace(ORIGIN, metrics={}, tested="")
    folder = write_bundle(settings, flight_delay, model, rows.head(500), "flight-delay@4", bare)
    assert "never tested" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_use_case_without_groups_has_features_that_stand_alone(
    model: Pipeline, rows: pd.DataFrame, settings: Settings
) -> None:
    plain = replace(flight_delay, groups=())
    manifest = read_bundle(write_bundle(settings, plain, model, rows.head(500), "flight-delay@4", ORIGIN))
    assert {feature.group for feature in manifest.features} == {""}


# ---------------------------------------------------------------- whole, or refused


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        read_bundle(own)


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "golden.json", "model.onnx"])
@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-1], lambda content: content[:9] + b"?" + content[10:], lambda content: b""]
)
def test_a_changed_or_cut_file_is_refused_with_both_checksums(
    own: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    expected = read_bundle(own).files[name]
    content = spoil((own / name).read_bytes())
    (own / name).write_bytes(content)
    with pytest.raises(BundleError) as caught:
        read_bundle(own)
    for words in (f"{name} is damaged", hashlib.sha256(content).hexdigest()[:12], expected[:12], "package the model"):
        assert words in str(caught.value)


def test_a_file_that_the_manifest_does_not_name_is_refused(own: Path) -> None:
    (own / "model.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match=r"not part of the bundle: model\.pkl"):
        read_bundle(own)


def test_a_bundle_that_is_not_there_names_those_that_are(own: Path) -> None:
    with pytest.raises(BundleError, match=f"there is no .*Those that are there: {own.name}"):
        read_bundle(own.parent / "flight-delay@77")
    for name in ("another-model-of-ours@7", ".flight-delay@8.tmp"):
        shutil.copytree(own, own.parent / name)
    with pytest.raises(BundleError, match=f"Those that are there: {own.name}"):
        read_bundle(own.parent / "flight-delay@77")


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"there is no .*bundle\.json. Fetch the bundle again"):
        read_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BundleError, match=r"can.t read"):
        read_bundle(tmp_path / "file")


def test_a_huge_file_is_refused_before_it_is_read(own: Path) -> None:
    with (own / "bundle.json").open("ab") as file:
        file.truncate(10_000_000_000)
    with pytest.raises(BundleError, match="has 10000000000 bytes; at most"):
        read_bundle(own)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a manifest"),
        (b"\x80\x04}", "is not a manifest"),
        (b"[]", "is not a manifest"),
        (b'{"model": "flight-delay@3"}', "missing required field `format`"),
        (b'{"format": 2}', "missing required field"),
        (b'{"format": 1, "anything": true}', "has format 1, this program reads format 2"),
        (b'{"format": "1"}', "is not a manifest"),
        (b'{"format": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not a manifest"),
    ],
)
def test_what_is_no_manifest_of_this_format_is_refused(own: Path, content: bytes, words: str) -> None:
    (own / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        read_bundle(own)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 7}, "the threshold is 7"),
        ({"threshold": None}, "threshold"),
        ({"model": "../../etc"}, "'../../etc' is not the name of a version"),
        ({"model": "flight-delay@latest"}, "is not the name of a version"),
        ({"features": []}, "0 features"),
        ({"features": [{"name": "a", "kind": "number"}] * 2}, "2 features, of which 1 have different names"),
        ({"features": [{"name": "a", "kind": "category"}]}, "a category with 0 categories"),
        ({"features": [{"name": "a", "kind": "number", "categories": ["x"]}]}, "a number with 1 categories"),
        ({"features": [{"name": "a", "kind": "category", "categories": ["x", "x"]}]}, "with 2 categories"),
        ({"features": [{"name": "a", "kind": "number", "typical": "fog"}]}, "'fog' is typical"),
        ({"features": [{"name": "a", "kind": "image"}]}, "is not a manifest"),
        ({"files": {}}, "must name model.onnx, MODEL_CARD.md, golden.json, but names none"),
        ({"files": {"../../secret": "0" * 64, "model.onnx": "0" * 64}}, "must name"),
        ({"files": {"model.pkl": "0" * 64, "MODEL_CARD.md": "0" * 64}}, "must name"),
        ({"more": 1}, "unknown field `more`"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(own: Path, change: dict[str, Any], words: str) -> None:
    reseal(own, **change)
    with pytest.raises(BundleError) as caught:
        read_bundle(own)
    assert words in str(caught.value)


def one_letter(manifest: dict[str, Any]) -> None:
    """An airline that the model knows has another name."""
    known = manifest["features"][0]["categories"]
    known[0] = known[0][:-1] + "?"


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a letter of a category": one_letter,
    "the order of categories": lambda manifest: manifest["features"][0]["categories"].reverse(),
    "the order of features": lambda manifest: manifest["features"].reverse(),
    "what is typical": lambda manifest: manifest["features"][-1].update(typical=7.5),
    "the threshold": lambda manifest: manifest.update(threshold=0.3),
    "the horizon": lambda manifest: manifest.update(horizon_minutes=0),
    "what the key is": lambda manifest: manifest.update(key=["flight"]),
    "the data": lambda manifest: manifest["data"].update(features="features@5"),
    "the run": lambda manifest: manifest.update(run_id="another"),
    "the machine": lambda manifest: manifest["fingerprint"].update(commit="0" * 40),
    "the version": lambda manifest: manifest.update(model="flight-delay@4"),
    "the question": lambda manifest: manifest.update(question="Is it Monday?"),
    "the checksum of the model": lambda manifest: manifest["files"].update({"model.onnx": "0" * 64}),
    "the digest": lambda manifest: manifest.update(digest="0" * 64),
    "no digest": lambda manifest: manifest.pop("digest"),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_manifest_that_was_changed_is_refused_whatever_it_was(own: Path, settings: Settings, what: str) -> None:
    manifest = json.loads((own / "bundle.json").read_text(encoding="utf-8"))
    CHANGES[what](manifest)
    (own / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    for use in (read_bundle, load_predictor, lambda folder: publish(settings, folder)):
        with pytest.raises(BundleError, match="was changed after it was written"):
            use(own)
    assert live_bundle(settings) is None


def test_how_a_manifest_is_indented_does_not_matter(own: Path) -> None:
    before = read_bundle(own)
    (own / "bundle.json").write_bytes(msgspec.json.format((own / "bundle.json").read_bytes(), indent=7))
    assert read_bundle(own) == before


# ---------------------------------------------------------------- it answers as the original model did


def golden_rows(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return found


def test_the_golden_rows_have_each_category_missing_values_and_the_scores_of_scikit_learn(
    made: Path, model: Pipeline, rows: pd.DataFrame
) -> None:
    golden = golden_rows(made)
    frame = pd.DataFrame(golden["features"])
    assert list(frame.columns) == list(model.feature_names_in_)
    np.testing.assert_array_equal(scores(model, frame.astype({"wind_gust": float})), golden["scores"])
    for feature in read_bundle(made).features:
        assert set(feature.categories) <= set(frame[feature.name])
    assert frame["wind_gust"].isna().mean() > 0.5, "as in the data"
    real = rows[list(frame.columns)].iloc[[0, -1]]
    assert frame["distance"].iloc[[0, -1]].tolist() == real["distance"].tolist(), "the first one and the last one"
    assert len(set(golden["scores"])) > 100


@pytest.mark.parametrize("places", [(0, -1), (1, -2), (2, -3)])  # ranked by how late they are: these differ most
def test_categories_that_change_places_are_found_whatever_the_checksums_say(
    own: Path, settings: Settings, places: tuple[int, int]
) -> None:
    one, other = places
    features = json.loads((own / "bundle.json").read_text(encoding="utf-8"))["features"]
    for feature in features:
        if known := feature.get("categories"):
            known[one], known[other] = known[other], known[one]
            break
    reseal(own, features=features)
    assert read_bundle(own).model == own.name, "all checksums are right"
    with pytest.raises(BundleError, match=r"flight-delay@3 scores \d+ of \d+ golden rows otherwise than .* row \d"):
        load_predictor(own)
    with pytest.raises(BundleError, match="golden rows otherwise"):
        publish(settings, own)
    assert live_bundle(settings) is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda golden: golden["scores"].clear(), "have [0, "),
        (lambda golden: golden["features"]["carrier"].pop(), "values a column"),
        (lambda golden: golden["features"].pop("carrier"), "lack carrier"),
        (lambda golden: golden["features"].update(more=[0.0] * len(golden["scores"])), "knows no feature 'more'"),
        (lambda golden: golden["scores"].__setitem__(3, 0.5), "row 3 as 0."),
        (lambda golden: golden.clear(), "can't be read"),
    ],
)
def test_golden_rows_that_are_not_what_they_should_be_are_refused(
    own: Path, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    golden = golden_rows(own)
    spoil(golden)
    rewrite(own, "golden.json", json.dumps(golden).encode())
    with pytest.raises(BundleError) as caught:
        load_predictor(own)
    assert words in str(caught.value)
    assert "flight-delay@3" in str(caught.value)


def test_golden_rows_do_not_count_as_requests(made: Path) -> None:
    assert not load_predictor(made).unknown


# ---------------------------------------------------------------- nothing in it is run


class Payload:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def graph_of(*nodes: Any, **more: Any) -> bytes:
    """A model with the right inputs and outputs, and any operations."""
    inputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, 117])]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs, **more)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def far_away() -> Any:
    """A tensor whose values are in a file outside of the bundle."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[117, 2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../secret")
    return tensor


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (b"not a graph", "it is not valid ONNX"),
        (pickle.dumps(Payload()), "it is not valid ONNX"),
        (b"", "its operations are none"),
        (graph_of(helper.make_node("MatMul", ["features", "w"], ["probabilities"]), initializer=[far_away()]), "Mat"),
        (graph_of(helper.make_node("Loop", ["features"], ["probabilities"])), "its operations are Loop"),
        (graph_of(helper.make_node("Run", ["features"], ["probabilities"], domain="evil")), "its operations are Run"),
        (
            graph_of(helper.make_node("TreeEnsembleClassifier", ["features"], ["probabilities"], domain="ai.onnx.ml")),
            "its scores are not probabilities",
        ),
    ],
)
def test_a_graph_with_anything_but_trees_is_refused(
    own: Path, graph: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(own, "model.onnx", graph)
    with pytest.raises(BundleError) as caught:
        load_predictor(own)
    assert words in str(caught.value)
    assert not (tmp_path / "owned").exists()


def attribute(name: str, change: Callable[[Any], None], of: str = "nodes") -> Callable[[Any], None]:
    """A change of one part of the table of trees."""

    def spoil(model: Any) -> None:
        change(next(each for each in model.graph.node[0].attribute if each.name == f"{of}_{name}"))

    return spoil


def put(name: str, value: int) -> Callable[[Any], None]:
    return attribute(name, lambda part: part.ints.__setitem__(0, value))


def no_values(part: Any) -> None:
    del part.floats[:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (put("truenodeids", 0), "circles"),
        (put("falsenodeids", 10**6), "lead nowhere"),
        (put("falsenodeids", -1), "circles"),
        (put("nodeids", 10**6), "lead nowhere"),
        (put("featureids", 117), "look at features beyond the 117"),
        (put("featureids", -1), "look at features beyond"),
        (attribute("values", no_values), "incomplete"),
        (attribute("modes", lambda part: part.strings.__setitem__(0, b"BRANCH_EQ")), "branches of an unknown kind"),
        (lambda model: model.graph.node[0].attribute.pop(), "its scores are not probabilities"),
        (lambda model: model.graph.node[0].attribute.pop(3), "its leaves are incomplete|its trees are incomplete"),
        (attribute("nodeids", lambda part: part.ints.__setitem__(0, 10**6), "class"), "lead nowhere"),
        (attribute("ids", lambda part: part.ints.__setitem__(0, 7), "class"), "leaves are incomplete"),
        (attribute("values", lambda part: part.floats.__setitem__(0, float("nan"))), "nodes_values are not all finite"),
        (attribute("weights", lambda part: part.floats.__setitem__(0, float("nan")), "class"), "class_weights are not"),
        (attribute("weights", lambda part: part.floats.__setitem__(0, float("inf")), "class"), "class_weights are not"),
        (lambda model: setattr(model.graph.output[1], "name", "scores"), "can.t be loaded|must take"),
        (lambda model: model.graph.input[0].type.tensor_type.shape.dim.pop(), "must take"),
    ],
)
def test_trees_that_lead_nowhere_are_refused(own: Path, spoil: Callable[[Any], None], words: str) -> None:
    model = onnx.load_model(own / "model.onnx")
    spoil(model)
    rewrite(own, "model.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=words):
        load_predictor(own)


LOAD = """
import json, sys
import psutil
from mlops_course.environment import load_settings
from mlops_course.serving import load_predictor, open_feature_table, live_bundle
predictor = load_predictor(sys.argv[1])
record = {feature.name: feature.typical for feature in predictor.manifest.features}
row = predictor.encode([record])
score = float(predictor.scores(row)[0])
predictor.reasons(row)
heavy = {"sklearn", "pandas", "mlflow", "scipy", "skl2onnx", "skops", "pyarrow"} & set(sys.modules)
megabytes = psutil.Process().memory_info().rss // 1_000_000
print(json.dumps({"heavy": sorted(heavy), "score": score, "megabytes": megabytes}))
"""


def test_it_is_used_without_the_libraries_that_made_it_and_in_little_memory(made: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, str(made)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["heavy"] == []
    assert 0 < told["score"] < 1
    assert told["megabytes"] < 150, "of the 200 that a worker may use, the server needs some, too"


# ---------------------------------------------------------------- which one is live


def second(own: Path) -> str:
    """Another bundle beside it."""
    other = Path(shutil.copytree(own, own.with_name("flight-delay@4")))
    reseal(other, model=other.name)
    return other.name


def test_before_anything_is_published_nothing_is_live(settings: Settings) -> None:
    assert live_bundle(settings) is None


def test_a_published_bundle_is_live_by_its_name_or_its_folder(own: Path, settings: Settings) -> None:
    assert publish(settings, "flight-delay@3") == own == live_bundle(settings)
    live = settings.serving / "flight-delay" / "live.json"
    stamp = live.stat().st_mtime_ns
    assert publish(settings, own) == own
    assert live.stat().st_mtime_ns == stamp, "the same again writes nothing"
    assert json.loads(live.read_text(encoding="utf-8"))["bundle"] == "flight-delay@3"


def test_a_bundle_from_elsewhere_is_copied_in(made: Path, settings: Settings) -> None:
    home = publish(settings, made)
    assert home == bundles_folder(settings) / "flight-delay@3" == live_bundle(settings)
    assert {name: (home / name).read_bytes() for name in FILES} == {n: (made / n).read_bytes() for n in FILES}


@pytest.mark.parametrize("name", ["flight-delay@9", "nothing", "../flight-delay@3"])
def test_what_is_not_there_is_not_published(own: Path, settings: Settings, name: str) -> None:
    publish(settings, "flight-delay@3")
    with pytest.raises(BundleError):
        publish(settings, name)
    assert live_bundle(settings) == own


def test_a_damaged_bundle_is_not_published(own: Path, settings: Settings) -> None:
    (own / "model.onnx").write_bytes(b"?")
    with pytest.raises(BundleError, match="damaged"):
        publish(settings, "flight-delay@3")
    assert live_bundle(settings) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"bundle": "flight-delay@3"}', '{"bundle": "../x", "manifest": "0"}', '{"bundle": 3}', "\xff"]
)
def test_a_damaged_note_of_what_is_live_is_refused(own: Path, settings: Settings, text: str) -> None:
    live = settings.serving / "flight-delay" / "live.json"
    live.parent.mkdir()
    live.write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"live\.json"):
        live_bundle(settings)


def test_a_bundle_that_was_changed_after_it_was_published_is_refused(own: Path, settings: Settings) -> None:
    publish(settings, own)
    rewrite(own, "MODEL_CARD.md", b"It is perfect.")
    with pytest.raises(BundleError, match="is not the bundle that was published"):
        live_bundle(settings)
    shutil.rmtree(own)
    with pytest.raises(BundleError, match="there is no"):
        live_bundle(settings)


def test_a_version_that_was_published_never_changes(
    own: Path, model: Pipeline, rows: pd.DataFrame, settings: Settings, tmp_path: Path
) -> None:
    newer = msgspec.structs.replace(ORIGIN, run_id="another")
    write_bundle(settings, flight_delay, model, rows, own.name, newer)
    published = {name: (publish(settings, own.name) / name).read_bytes() for name in FILES}
    publish(settings, second(own))
    with pytest.raises(BundleError, match=r"flight-delay@3 was published with another content.*as a new version"):
        write_bundle(settings, flight_delay, model, rows, own.name, ORIGIN)
    elsewhere = write_bundle(settings_in(tmp_path), flight_delay, model, rows, own.name, ORIGIN)
    with pytest.raises(BundleError, match="a published version never changes"):
        publish(settings, elsewhere)
    assert {name: (own / name).read_bytes() for name in FILES} == published
    shutil.rmtree(own)
    assert write_bundle(settings, flight_delay, model, rows, own.name, newer) == own, "the same again changes nothing"
    assert publish(settings, own.name) == live_bundle(settings)
    assert {name: (own / name).read_bytes() for name in FILES} == published


def test_whoever_looks_while_bundles_are_swapped_always_finds_a_whole_one(own: Path, settings: Settings) -> None:
    second(own)
    publish(settings, own)
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(read_bundle(live_bundle(settings) or "").model)

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(60):
        publish(settings, f"flight-delay@{3 + number % 2}")
    done.set()
    watcher.join()
    assert seen == {"flight-delay@3", "flight-delay@4"}


# ---------------------------------------------------------------- and the ledger says so


def test_what_is_live_is_compared_with_the_ledger(own: Path, settings: Settings) -> None:
    assert check_live(settings) == []
    publish(settings, own, "the first one", by="ann")
    publish(settings, second(own), "better", by="ann")
    assert check_live(settings) == []
    lines = settings.ledger.read_bytes().splitlines(keepends=True)
    for left, told in ((1, "line 1 says flight-delay@3"), (0, "the ledger says nothing about it")):
        settings.ledger.write_bytes(b"".join(lines[:left]))
        (found,) = check_live(settings)
        assert found.startswith("live in flight-delay is flight-delay@4 with the manifest ")
        assert told in found
    (done,) = repair_live(settings, by="eve")
    (line,) = read_ledger(settings)
    assert (line.event, line.by, line.after["live"], done.startswith("line 1 was added")) == (
        "adopt", "eve", "flight-delay@4", True,
    )  # fmt: skip
    assert check_live(settings) == repair_live(settings) == []
    assert live_bundle(settings) == own.with_name("flight-delay@4")
    (settings.serving / "flight-delay" / "live.json").unlink()
    assert "live in flight-delay is no bundle, and line 1 says flight-delay@4" in check_live(settings)[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
def test_a_publisher_that_is_killed_after_any_change_leaves_one_of_the_two(own: Path, settings: Settings) -> None:
    command = [sys.executable, registry_helpers.__file__, "publish", own.name, second(own)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    killed, unfinished = map(int, done.stdout.split())
    assert killed >= 5, "the line, the file beside live.json, and its new name"
    assert unfinished > 0, "some had written their line, and no more"
