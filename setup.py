"""Builds the package. Everything it says comes from settings.ini, read with the standard library alone."""

import hashlib
import json
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
STATUS = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
LICENSES = {"apache2": "Apache-2.0"}
PYTHONS = ("3.11", "3.12", "3.13")
CARRIED = ("*.ipynb", "pipelines/*.ipynb", "pipelines/*.yaml", "pipelines/*.json", "internals/*.ipynb")  # of nbs
TEMPLATE = ("copier.yml", "project/**/*")  # of template: what `mlops-course new` makes a project of
READ = ("Dockerfile", "serving.lock", "kubernetes/**/*.yaml", "prometheus/*.yml")  # of deploy: read by lessons, `up`


def read_settings() -> dict[str, str]:
    """The project's settings as a dictionary."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def build_state() -> str:
    """Which code is built, as JSON: git's answer, or in an unpacked sdist what the sdist's maker wrote down."""
    written = ROOT / read_settings()["lib_name"] / "_build.json"
    if written.is_file():
        return written.read_text(encoding="utf-8")
    state: dict[str, object] = {"commit": None, "dirty": None, "lock": None}
    lock = ROOT / "requirements.lock"
    if lock.is_file():
        state["lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    if (ROOT / ".git").exists():  # else git would answer for a repository around this folder
        state["commit"] = ask_git("rev-parse", "--verify", "HEAD")
        changed = ask_git("status", "--porcelain")
        state["dirty"] = None if changed is None else bool(changed)
    return json.dumps(state) + "\n"


def ask_git(*arguments: str) -> "str | None":
    """What git says; None when it can't."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class SourceWithState(sdist):
    """Writes down which code it is, since an sdist has no git history."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy as usual, then add the file to the copy."""
        super().make_release_tree(base_dir, files)
        path = Path(base_dir) / read_settings()["lib_name"] / "_build.json"
        path.write_text(build_state(), encoding="utf-8")


class BuildWithNotebooks(build_py):
    """Puts the lessons and the pipelines' notebooks into the package, so that an installed one can run them."""

    def run(self) -> None:
        """Build as usual, then copy the notebooks; an editable install reads them in the repository instead."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / read_settings()["lib_name"]
        (package / "_build.json").write_text(build_state(), encoding="utf-8")
        self.carry("nbs", CARRIED, package / "_notebooks")
        self.carry("deploy", READ, package / "deploy")  # beside the notebooks, as in the repository
        self.carry("template", TEMPLATE, package / "_template")

    def carry(self, folder: str, patterns: tuple[str, ...], target: Path) -> None:
        """Copy a folder's files into the package."""
        shutil.rmtree(target, ignore_errors=True)
        for source in sorted(path for pattern in patterns for path in (ROOT / folder).glob(pattern) if path.is_file()):
            copy = target / source.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


settings = read_settings()
name = settings["lib_name"]
setup(
    name=name,
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license=LICENSES[settings["license"]],
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUS[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
        "Typing :: Typed",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["py.typed"]},
    include_package_data=False,
    install_requires=settings["requirements"].split(),
    extras_require={
        "course": settings["course_requirements"].split(),
        "cluster": settings["cluster_requirements"].split(),
        "s3": settings["s3_requirements"].split(),
        "tracing": settings["tracing_requirements"].split(),
        "scaffold": settings["scaffold_requirements"].split(),
        "dev": settings["dev_requirements"].split(),
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{name} = {name}._modidx:d"],
        "papermill.engine": [f"mlops-course = {name}.pipelines.engine:WarmEngine"],
    },
    zip_safe=False,
    cmdclass={"build_py": BuildWithNotebooks, "sdist": SourceWithState},
)
