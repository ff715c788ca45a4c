"""Where a script can fail without anybody noticing; and no alarm where nothing is lost."""

import subprocess
from pathlib import Path
from textwrap import dedent

import pytest

from mlops_course.delivery.exit_status import (
    WorkflowError,
    blank_text,
    find_lost_statuses,
    lint_exit_statuses,
    lint_makefile,
    lint_workflow,
)


def rules(script: str, strict: bool = True) -> list[tuple[int, str]]:
    """Line and rule of each finding in a script that begins with `set -e`."""
    first = "set -e\n" if strict else ""
    return [(each.line - strict, each.rule) for each in find_lost_statuses(first + dedent(script))]


PLANTED = {
    "a pipe": ("pytest | tee log\n", "pipe"),
    "a pipe with errors": ("pytest |& tee log\n", "pipe"),
    "a pipe over two lines": ("pytest \\\n  | tee log\n", "pipe"),
    "a pipe with the bar at the end": ("pytest |\n  tee log\n", "pipe"),
    "the second of three": ("echo x | pytest | tee log\n", "pipe"),
    "a pipe in a substitution": ('test "$(git status | wc -l)" = 0\n', "pipe"),
    "a pipe in a subshell": ("(cd x && pytest | tee log)\n", "pipe"),
    "a pipe in a branch": ("if test -f x; then\n  pytest | tee log\nfi\n", "pipe"),
    "a pipe in a function": ("f() {\n  pytest | tee log\n}\n", "pipe"),
    "a pipe after pipefail was turned off": ("set -o pipefail\nset +o pipefail\npytest | tee log\n", "pipe"),
    "a pipe from a here-document": ("psql <<END | tee log\nselect 1 || true\nEND\n", "pipe"),
    "or true": ("pytest || true\n", "or-true"),
    "or colon": ("pytest || :\n", "or-true"),
    "or true on a line of its own": ("pytest \\\n  || true\n", "or-true"),
    "or exit 0": ("pytest || exit 0\n", "or-true"),
    "or echo": ('pytest || echo "some failed"\n', "or-true"),
    "or a group that says something": ('pytest || { make log; echo "some failed"; }\n', "or-true"),
    "or a group that ends well": ("pytest || { make log; exit 0; }\n", "or-true"),
    "a chain that ends in true": ("make a && make b || true\n", "or-true"),
    "errexit off": ("set +e\npytest\nmake docs\n", "errexit-off"),
    "errexit off, and the status is looked at too late": ("set +e\npytest\nset -e\nexit $?\n", "errexit-off"),
    "errexit off in one word with another": ("set +ex\npytest\n", "errexit-off"),
    "errexit off, spelled out": ("set +o errexit\npytest\n", "errexit-off"),
    "export": ("export V=$(git describe)\n", "declared"),
    "local, in quotes": ('local v="$(git describe)"\n', "declared"),
    "a checker told to succeed": ("ruff check --exit-zero .\n", "exit-zero"),
    "make told to go on": ("make -i test\n", "exit-zero"),
    "a list that set -e doesn't watch": ("pytest && echo ok\nmake publish\n", "and-list"),
    "the same in a branch": ("if test -f x; then\n  cd x && make\nfi\nmake publish\n", "and-list"),
    "a pipe in a list": ("set -o pipefail\npytest && make | tee log\nmake publish\n", "and-list"),
    "a reason that isn't one": ("pytest || true # status-ok:\n", "or-true"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_loss_is_found(name: str) -> None:
    script, rule = PLANTED[name]
    assert [found for _, found in rules(script)] == [rule]


INNOCENT = {
    "pipefail": "set -o pipefail\npytest | tee log\n",
    "pipefail with the others": "set -euo pipefail\npytest | tee log\n",
    "a bar in quotes": "grep 'a | b' x\ngrep \"c | d || true\" y\n",
    "a bar in a comment": "pytest # never | tee log || true\n",
    "a bar in a here-document": "cat <<END\npytest | tee log || true\nEND\n",
    "a bar in an indented here-document": "cat <<-'END'\n\tpytest | tee log\n\tEND\n",
    "a bar in a pattern": "case $x in a|b) make a ;; *) make b ;; esac\n",
    "a bar in a condition": "if [[ $x == a || $y == b ]]; then make; fi\n",
    "bits": "x=$(( 1 | 2 ))\n",
    "a default": "x=${y:-a|b}\n",
    "the last command is the question": "if curl -s x | grep -q ok; then make; fi\n",
    "while reading": "while git log | grep -q x; do make; done\n",
    "what can't fail": "echo a | tee log\nprintf 'x' | sort\n",
    "a failure that is handled": "make || { cat log; exit 1; }\n",
    "a failure that is told": 'make || { echo "it failed" >&2; exit 1; }\nmake || { printf x; make log; }\n',
    "or fail": "make || exit 1\nmake || exit 2\n",
    "the status is looked at": "set +e\npytest\nstatus=$?\nset -e\nexit $status\n",
    "a value to fall back on": "x=$(git describe || echo unknown)\n",
    "two lines": "V=$(git describe)\nexport V\n",
    "descriptors": "make 2>&1 >log\nmake &>log\nmake >| log\n",
    "escaped": "echo a \\| b \\|\\| true\n",
    "the reason is given": "rm -r x || true # status-ok: it may be gone\n",
    "the reason above": "# status-ok: it may be gone\nrm -r x || true\n",
    "the last list": "make a\ncd x && make b\n",
    "the last list, in a branch": "if test -f x; then\n  cd x && make\nfi\n",
    "a list in a subshell": "(cd x && make)\nmake b\n",
    "a list in a function": "f() {\n  cd x && make\n}\nf\nmake b\n",
    "a list that is handled": "cd x && make || exit 1\nmake b\n",
    "a question before a command": "[ -f x ] && rm x\ncommand -v z && z\ngrep -q a b && make\nmake c\n",
    "a list as a question": "if cd x && make; then make a; fi\nmake b\n",
    "a word with a sign in it": 'echo "it\'s # no comment" && make a#b\n',
}


@pytest.mark.parametrize("name", INNOCENT)
def test_what_loses_nothing_is_left_alone(name: str) -> None:
    assert rules(INNOCENT[name]) == []


def test_arguments_of_the_script_switch_nothing() -> None:
    assert rules("set -- -e\nmake a\nmake b\n", strict=False) == [(2, "no-errexit")]


@pytest.mark.parametrize("name", [*PLANTED, *INNOCENT])
def test_the_examples_are_shell_and_keep_their_length(name: str) -> None:
    script = PLANTED[name][0] if name in PLANTED else INNOCENT[name]
    assert len(blank_text(script)) == len(script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_the_line_is_the_one_of_the_file() -> None:
    assert rules("make a\n\ncat <<END\nx\nEND\nmake b || true\n") == [(6, "or-true")]


UNGUARDED = ["make a\nmake b\n", "#!/bin/sh\nmake a; make b\n", "for x in a b; do make $x; done\n"]
UNGUARDED += ["make a\nset -e\nmake b\n", "if test -f x; then make a; make b; else make c; fi\n"]
UNGUARDED += ["if test -f x; then make a; fi\nmake b\n", "case $x in a) make a; make b ;; b) make c ;; esac\n"]


@pytest.mark.parametrize("script", UNGUARDED)
def test_a_script_of_several_commands_needs_errexit(script: str) -> None:
    assert [rule for _, rule in rules(script, strict=False)] == ["no-errexit"]


TWO = "make a\nmake b\n"


GUARDED = ["exec serve\n", f"#!/bin/sh -e\n{TWO}", f"set -o errexit\n{TWO}", f"#!/bin/sh\n# why\nx=1\nset -eu\n{TWO}"]
GUARDED += ["case $x in a) make a ;; b) make b ;; esac\n", 'cd "$(dirname "$0")" || exit 1\nmake\n']
GUARDED += ["if test -f x; then make a; elif test -f y; then make b; fi\n"]
GUARDED += ["cd x && make\n", "cd x || exit 1\nmake\n", "if test -f x; then make a; else make b; fi\n"]


@pytest.mark.parametrize("script", GUARDED)
def test_and_one_that_has_it_or_one_command_does_not(script: str) -> None:
    assert rules(script, strict=False) == []


# ---------------------------------------------------------------- workflows

STEP = "jobs:\n  tests:\n    runs-on: ubuntu-latest\n    steps:\n"


def workflow_rules(text: str) -> list[tuple[int, str]]:
    return [(each.line, each.rule) for each in lint_workflow(text)]


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ("      - run: pytest | tee log\n", [(5, "pipe")]),
        ("      - run: |\n          make\n          pytest | tee log\n", [(7, "pipe")]),
        ("      - shell: sh\n        run: pytest | tee log\n", [(6, "pipe")]),
        ("      - shell: bash -e {0}\n        run: pytest | tee log\n", [(6, "pipe")]),
        ("      - run: make a\n      - run: pytest || true\n", [(6, "or-true")]),
        ("      - run: pytest\n        continue-on-error: true\n", [(6, "continue")]),
        ("      - uses: x/security-scan@v1\n        continue-on-error: true\n", [(6, "continue")]),
        ("      - shell: bash\n        run: pytest | tee log\n", []),
        ("      - run: |\n          set -o pipefail\n          pytest | tee log\n", []),
        ("      - shell: python\n        run: print(1 | 2)\n", []),
        ("      - run: make docs\n        continue-on-error: true\n", []),
        ("      - run: pytest\n        continue-on-error: ${{ matrix.experimental }}\n", []),
        ("      - run: echo ${{ github.ref || 'main' }} && make a\n", []),
        ("      - run: pytest || true # status-ok: only its log counts here\n", []),
        ("      # status-ok: flaky upstream, see the release notes\n      - run: pytest || true\n", []),
    ],
)
def test_a_step(step: str, found: list[tuple[int, str]]) -> None:
    assert workflow_rules(STEP + step) == found


def test_a_job_of_tests_that_may_fail() -> None:
    job = "jobs:\n  tests:\n    continue-on-error: true\n    steps:\n      - run: pytest\n"
    assert workflow_rules(job) == [(3, "continue")]


@pytest.mark.parametrize(
    ("condition", "found"),
    [("always()", [(5, "always")]), ("always() && needs.tests.result == 'success'", []), ("success()", [])],
)
def test_a_job_that_goes_on_whatever_happened_before(condition: str, found: list[tuple[int, str]]) -> None:
    jobs = "jobs:\n  tests: {steps: []}\n  publish:\n    needs: tests\n"
    text = f"{jobs}    if: {condition}\n    steps: [{{run: make}}]\n"
    assert workflow_rules(text) == found


@pytest.mark.parametrize("where", ["workflow", "job"])
def test_the_default_shell_counts(where: str) -> None:
    default = "defaults: {run: {shell: bash}}\n"
    text = default + STEP if where == "workflow" else STEP.replace("    steps", f"    {default}    steps")
    assert workflow_rules(text + "      - run: pytest | tee log\n") == []


@pytest.mark.parametrize("text", ["a: [", "name: x\n", "- a\n", ""])
def test_what_is_no_workflow_is_refused(text: str) -> None:
    with pytest.raises(WorkflowError):
        lint_workflow(text)


# ---------------------------------------------------------------- Makefiles


@pytest.mark.parametrize(
    ("makefile", "found"),
    [
        ("a:\n\tpytest | tee log\n", [(2, "pipe")]),
        ("a:\n\t@pytest || true\n", [(2, "or-true")]),
        ("a:\n\tpytest; make b\n", [(2, "no-errexit")]),
        ("a:\n\tfor x in a b; do make $$x; done\n", [(2, "no-errexit")]),
        ("a:\n\tmake b\n\tmake c; \\\n\tmake d\n", [(3, "no-errexit")]),
        ("a:\n\t-pytest\n", [(2, "ignored")]),
        ("a:\n\t@-pytest\n", [(2, "ignored")]),
        (".IGNORE: a\na:\n\tpytest\n", [(1, "ignored")]),
        ("MAKEFLAGS += -i\na:\n\tpytest\n", [(1, "ignored")]),
        ("MAKEFLAGS += --no-print-directory -rR\na:\n\tpytest\n", []),
        ("a:\n\tpytest\n\tcd x && make\n", []),
        ("a:\n\t@$(PYTHON) tasks.py $@ $(ARGS)\n", []),
        ("a: b | c\nx := $(shell a | b)\n\t@echo $(patsubst %,a|%,$(x)) $$x\n", []),
        ("a:\n\tif test -f x; then make b; fi\n", []),
        ("a:\n\t-rm x # status-ok: it may be gone\n", []),
        (".SHELLFLAGS := -eu -o pipefail -c\na:\n\tpytest | tee log; make b\n", []),
    ],
)
def test_a_makefile(makefile: str, found: list[tuple[int, str]]) -> None:
    assert [(each.line, each.rule) for each in lint_makefile(makefile)] == found


# ---------------------------------------------------------------- this project


def test_our_own_workflows_and_scripts_lose_nothing(root: Path) -> None:
    assert lint_exit_statuses(root) == []


def test_and_it_would_be_seen_if_they_did(root: Path, tmp_path: Path) -> None:
    """The real files, each with one planted line."""
    ci = (root / ".ci" / "run").read_text(encoding="utf-8")
    hook = (root / ".githooks" / "pre-commit").read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    flow = (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    planted = {
        ".ci/run": ci.replace("make check ", "make check | cat ").replace("set -euo pipefail", "set -eu"),
        ".github/workflows/ci.yml": flow.replace("run: .ci/run", "run: .ci/run || true"),
        "deploy/start.sh": "#!/bin/sh\nset +e\nmigrate\nserve\n",
        ".githooks/pre-commit": hook.replace("    fi\n", "    fi\n    true || true\n"),
        "Makefile": makefile.replace("@$(PYTHON)", "-$(PYTHON)"),
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = [(each.path, each.rule) for each in lint_exit_statuses(tmp_path)]
    assert found == [
        (".ci/run", "pipe"),
        (".githooks/pre-commit", "or-true"),
        (".github/workflows/ci.yml", "or-true"),
        ("Makefile", "ignored"),
        ("deploy/start.sh", "errexit-off"),
        ("deploy/start.sh", "no-errexit"),
    ]


def test_nothing_to_look_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match="no workflow, no Makefile and no shell script"):
        lint_exit_statuses(tmp_path)
