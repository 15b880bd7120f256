"""Two small repositories with real lock files: Python with 41 packages, Node with 163, one test each.

Their workflows are the shipped examples, to the letter.
"""

from collections.abc import Mapping
from pathlib import Path

_HERE = Path(__file__).parent
_WORKFLOWS = Path(__file__).parents[3] / "workflows"
_WORKFLOW = {"python": "github-python-locked.yml", "node": "github-node.yml"}
NAMES = tuple(_WORKFLOW)


def sample(name: str) -> Mapping[str, str]:
    """The files of a sample repository by path, for ``scripts.programs.stage.make_repository``."""
    root = _HERE / name
    files = {
        str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()
    }
    return files | {".github/workflows/ci.yml": (_WORKFLOWS / _WORKFLOW[name]).read_text()}
