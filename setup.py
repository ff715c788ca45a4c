"""Builds the package. Everything it says comes from settings.ini, read with the standard library alone."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
STATUS = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
LICENSES = {"apache2": "Apache-2.0"}
PYTHONS = ("3.11", "3.12", "3.13")
CARRIED = ("*.ipynb", "pipelines/*.ipynb", "pipelines/*.yaml", "internals/*.ipynb")


def read_settings() -> dict[str, str]:
    """The project's settings as a dictionary."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


class BuildWithNotebooks(build_py):
    """Puts the lessons and the pipelines' notebooks into the package, so that an installed one can run them."""

    def run(self) -> None:
        """Build as usual, then copy the notebooks; an editable install reads them in the repository instead."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / read_settings()["lib_name"] / "_notebooks"
        shutil.rmtree(target, ignore_errors=True)
        for source in self.notebooks():
            copy = target / source.relative_to(ROOT / "nbs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

    def notebooks(self) -> list[Path]:
        """What the package carries."""
        return sorted(path for pattern in CARRIED for path in (ROOT / "nbs").glob(pattern))


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
        "dev": settings["dev_requirements"].split(),
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{name} = {name}._modidx:d"],
    },
    zip_safe=False,
    cmdclass={"build_py": BuildWithNotebooks},
)
