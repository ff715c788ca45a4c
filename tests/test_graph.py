"""Pipelines as pictures: everything is there, nothing lies on anything else, and no name can break the drawing."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from mlops_course.pipelines.definition import Pipeline, Stage, find_pipeline
from mlops_course.pipelines.graph import COLOURS, draw, flows, lay_out, mermaid, orders, save_picture
from mlops_course.pipelines.notebooks import ParameterError

NASTY = ["end", "class", "graph", "subgraph", "click-me", "x---y", "o_o"]  # words and signs of Mermaid's own

# stage: what it needs, what it makes
WIDE = {
    "fetch_flights": ([], ["flights"]),
    "fetch_weather": ([], ["weather"]),
    "fetch_planes": ([], ["planes", "airlines"]),
    "check_flights": (["flights"], ["clean_flights"]),
    "check_weather": (["weather"], ["clean_weather"]),
    "join": (["clean_flights", "clean_weather", "planes", "airlines"], ["features"]),
    "train_linear": (["features"], ["linear_model"]),
    "train_trees": (["features"], ["trees_model"]),
    "train_baseline": (["features", "flights"], ["baseline"]),
    "compare": (["linear_model", "trees_model", "baseline", "features"], ["best", "why"]),
    "register": (["best", "why"], ["version", "unused"]),
    "report": (["version", "clean_weather", "best"], ["page"]),
}


def make(folder: Path, stages: dict[str, tuple[list[str], list[str]]]) -> Pipeline:
    """A pipeline whose notebooks do nothing."""
    found = []
    for number, (name, (inputs, outputs)) in enumerate(stages.items()):
        cell = nbformat.v4.new_code_cell(
            "\n".join(f"{key}: str = None" for key in inputs), metadata={"tags": ["parameters"]}
        )
        record = nbformat.v4.new_code_cell(f"record_result({', '.join(f'{key}=1' for key in outputs)})")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell, record]), folder / f"{number}.ipynb")
        kinds = dict.fromkeys(outputs, "value")
        found.append(Stage(name, folder / f"{number}.ipynb", inputs=inputs, outputs=kinds))
    return Pipeline("wide", tuple(found))


@pytest.fixture(name="wide", scope="module")
def _wide(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(autouse=True)
def _close() -> object:
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


def edges(text: str) -> set[tuple[str, str, str]]:
    """What a Mermaid text says: from, label, to."""
    names = dict(re.findall(r'(stage\d+)\["(.*?)(?:<br/>.*)?"\]', text))
    found = re.findall(r'(stage\d+) -->\|"(.*)"\| (stage\d+)', text)
    return {(names[one], label, names[other]) for one, label, other in found}


def test_mermaid_says_who_needs_what_from_whom(wide: Pipeline) -> None:
    found = edges(mermaid(wide))
    assert {(one, other) for one, _, other in found} == {
        (need, name) for name in wide.needs for need in wide.needs[name]
    }
    assert ("join", "features", "compare") in found
    assert ("fetch_planes", "planes, airlines", "join") in found
    assert "unused" not in mermaid(wide)


@pytest.fixture(name="swept", scope="module")
def _swept(wide: Pipeline) -> Pipeline:
    """One stage more, before all others though nothing flows; and the last one after one that it takes from, too."""
    first = Stage("sweep", wide.notebook(wide.stages[0]))
    late = {"fetch_flights": ("sweep",), "report": ("compare", "train_trees")}
    return replace(wide, stages=(first, *[replace(stage, after=late.get(stage.name, ())) for stage in wide.stages]))


def test_order_without_data_is_a_dashed_line(swept: Pipeline, wide: Pipeline) -> None:
    expected = {("sweep", "fetch_flights"), ("train_trees", "report")}
    assert set(orders(swept)) == expected and orders(wide) == []
    text = mermaid(swept)
    names = dict(re.findall(r'(stage\d+)\["(.*?)"\]', text))
    assert {(names[one], names[other]) for one, other in re.findall(r"(stage\d+) -\.-> (stage\d+)", text)} == expected
    assert edges(text) == edges(mermaid(wide)), "what flows is as before"


def test_a_dashed_line_leads_downwards_and_over_nothing(swept: Pipeline) -> None:
    layout = lay_out(swept, {stage.name: "" for stage in swept.stages})
    assert [(line[0].stage, line[-1].stage) for line in layout.dashed] == orders(swept)
    for line in layout.dashed:
        assert [spot.layer for spot in line] == list(range(line[0].layer, line[-1].layer + 1))
    for layer in layout.layers:
        for one, other in itertools.combinations(layer, 2):
            assert abs(one.x - other.x) >= (one.width + other.width) / 2 + 10
    styles = [patch.get_linestyle() for patch in draw(swept).patches if type(patch).__name__ == "FancyArrowPatch"]
    assert styles.count("--") == 2


def test_mermaid_gives_each_state_its_colour_and_its_word(wide: Pipeline) -> None:
    text = mermaid(wide, {"join": "cached", "report": "not run", "compare": "failed"})
    for stage, state in {"join": "cached", "report": "not run", "compare": "failed"}.items():
        number = re.search(rf'(stage\d+)\["{stage}<br/>{state}"\]', text)[1]
        style = re.search(rf"class [\w,]*\b{number}\b[\w,]* (\w+)", text)[1]
        assert f"classDef {style} fill:{COLOURS[state][0]}," in text


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_text_in_mermaid_whatever_it_contains(tmp_path: Path, name: str) -> None:
    text = mermaid(make(tmp_path, {name: ([], ["a"]), "b": (["a"], [])}), {name: "done"})
    line = text.splitlines()[1]
    label = re.fullmatch(r'  stage0\["(.*)<br/>done"\]', line)[1]
    assert not set(label) & set('"[]<>|`$%\n')
    decoded = re.sub(r"#(\d+);", lambda found: chr(int(found[1])), label)
    assert decoded == " ".join(name.split())
    assert edges(text) == {(label, "a", "b")}


@pytest.mark.parametrize("name", ["training", "scoring", "monitoring"])
def test_nothing_lies_on_anything_else(name: str, wide: Pipeline) -> None:
    for pipeline in (find_pipeline(name), wide):
        layout = lay_out(pipeline, {stage.name: "not run" for stage in pipeline.stages})
        for layer in layout.layers:
            for one, other in itertools.combinations(layer, 2):
                assert abs(one.x - other.x) >= (one.width + other.width) / 2 + 10
        assert {spot.stage for layer in layout.layers for spot in layer if spot.stage} == set(pipeline.needs)
        for line in layout.lines:
            assert [spot.layer for spot in line] == list(range(line[0].layer, line[-1].layer + 1)), (
                "lines lead downwards"
            )


def test_texts_fit_into_their_boxes_and_into_the_picture(wide: Pipeline) -> None:
    axes = draw(wide, {"join": "cached", "compare": "interrupted"})
    axes.figure.canvas.draw()
    boxes = [patch.get_window_extent() for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    names = {name + {"join": "\ncached", "compare": "\ninterrupted"}.get(name, "") for name in wide.needs}
    texts = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert names <= set(texts)
    for name in names:
        inside = [
            box for box in boxes if box.x0 <= texts[name].x0 and texts[name].x1 <= box.x1 and box.y0 <= texts[name].y0
        ]
        assert len(inside) >= 1, name
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one.overlaps(other)
    picture = axes.figure.bbox
    assert all(picture.x0 <= text.x0 and text.x1 <= picture.x1 for text in texts.values())


def test_in_small_axes_everything_shrinks_together(wide: Pipeline) -> None:
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(figsize=(3, 3))
    assert draw(wide, axes=axes) is axes
    axes.figure.canvas.draw()
    texts = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(texts, 2))


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_texts_stand_out_from_what_is_behind_them(wide: Pipeline, style: str) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb

    def brightness(colour: object) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one: object, other: object) -> float:
        low, high = sorted([brightness(one), brightness(other)])
        return (high + 0.05) / (low + 0.05)

    with plt.style.context(style):
        axes = draw(wide)
        labels = [text for text in axes.texts if text.get_text() not in wide.needs]
        assert all(contrast(text.get_color(), axes.figure.get_facecolor()) > 4.5 for text in labels)
    assert all(contrast(fill, text) > 4.5 for fill, text in COLOURS.values())


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    made = save_picture(make(tmp_path, {name: ([], ["a"]), "b": (["a"], [])}), tmp_path / "x.svg")
    assert made.read_bytes().startswith(b"<?xml")


def test_pictures_are_files_of_the_kind_that_their_ending_says(wide: Pipeline, tmp_path: Path) -> None:
    assert save_picture(wide, tmp_path / "new" / "wide.PNG").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in save_picture(wide, tmp_path / "wide.svg").read_bytes()
    with pytest.raises(ParameterError, match=r"wide\.jpeg.*\.png or \.svg"):
        save_picture(wide, tmp_path / "wide.jpeg")


def test_unknown_stages_and_states_are_named(wide: Pipeline) -> None:
    with pytest.raises(ParameterError, match=r"no stage 'joyn'.*'join'"):
        mermaid(wide, {"joyn": "done"})
    with pytest.raises(ParameterError, match=r"state 'cashed'.*'cached'"):
        draw(wide, {"join": "cashed"})


def test_outputs_that_the_same_stages_need_share_a_label(wide: Pipeline) -> None:
    found = {(maker, tuple(outputs)): takers for maker, outputs, takers in flows(wide)}
    assert found["fetch_planes", ("planes", "airlines")] == ["join"]
    assert found["compare", ("best",)] == ["register", "report"]
    assert found["compare", ("why",)] == ["register"]


def test_one_stage_alone(tmp_path: Path) -> None:
    alone = make(tmp_path, {"only": ([], [])})
    assert "-->" not in mermaid(alone)
    assert [text.get_text() for text in draw(alone).texts] == ["only"]
