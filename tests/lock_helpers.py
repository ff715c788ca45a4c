"""A program as it is inside an image: without the packages that its lock doesn't bring."""

import re
from collections.abc import Iterable
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"

WITHOUT_OTHERS = """
import sys, json
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ModuleNotFoundError(name)
blocked = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Missing())
"""


def modules_beside(lock: str) -> list[str]:
    """The modules of this environment that an image doesn't have: neither its lock brings them nor we do."""
    from importlib.metadata import packages_distributions

    from mlops_course.environment import locked_versions

    def normal(names: Iterable[str]) -> set[str]:
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    there = normal(locked_versions(DEPLOY / lock)) | {"mlops-course"}
    return sorted(module for module, names in packages_distributions().items() if not normal(names) & there)
