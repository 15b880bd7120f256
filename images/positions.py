"""YAML into plain values, remembering where each stood, so that every later error can name its line."""

import datetime
from pathlib import Path
from typing import cast

import yaml

from images.errors import RecipeError

_MAX_BYTES = 256 << 10
_MAX_DEPTH = 12
# What PyYAML raises for a tag whose text does not suit it, as in "!!bool perhaps" or "!!timestamp never".
_UNREADABLE = (ValueError, LookupError, AttributeError)
# Aliases of aliases make few bytes many values.
_MAX_VALUES = 20_000

# A place inside a document: ("warm", 0, "run").
Place = tuple[str | int, ...]
Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]


def load(path: Path) -> tuple[dict[str, Plain], dict[Place, int]]:
    """The mapping a YAML file holds, and the line of every place in it (for a mapping's value, of its key).

    Raises RecipeError: unreadable, not YAML, not a mapping, a key twice, an alias inside itself.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", file=path) from None
    return parse(raw, path)


def parse(raw: bytes, file: Path | str) -> tuple[dict[str, Plain], dict[Place, int]]:
    """As ``load``, of text that is here; errors call it ``file``."""
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"is larger than {_MAX_BYTES >> 10} KiB", file=file)
    try:
        loader = yaml.SafeLoader(raw)
        node = loader.get_single_node()  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise RecipeError(f"is not YAML: {error.problem or error.context}", file=file, line=line) from None
    except RecursionError:
        raise RecipeError("is nested too deeply", file=file) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"is not YAML: {str(error).splitlines()[0]}", file=file) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError("must hold a mapping of keys to values", file=file, line=1)
    lines: dict[Place, int] = {}
    value = _Reader(file, loader, lines).read(node, ())
    return cast("dict[str, Plain]", value), lines


def inline(text: str) -> Plain:
    """A value on a command line: YAML when it is written as a list or mapping, the text itself otherwise
    (a sha256 of digits alone must stay a text). Raises ValueError."""
    if not text.startswith(("[", "{")):
        return text
    try:
        return cast("Plain", yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from None


class _Reader:
    def __init__(self, file: Path | str, loader: yaml.SafeLoader, lines: dict[Place, int]) -> None:
        self._file = file
        self._loader = loader
        self._lines = lines
        self._values = 0

    def read(self, node: yaml.Node, place: Place) -> Plain:
        line = node.start_mark.line + 1
        self._lines.setdefault(place, line)
        self._values += 1
        if self._values > _MAX_VALUES:
            raise RecipeError(f"holds more than {_MAX_VALUES} values", file=self._file, line=line)
        if len(place) > _MAX_DEPTH:
            raise RecipeError("is nested too deeply (an alias inside itself?)", file=self._file, line=line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            children = cast("list[yaml.Node]", node.value)
            return [self.read(child, (*place, index)) for index, child in enumerate(children)]
        try:
            value = cast("object", self._loader.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
        except yaml.MarkedYAMLError as error:
            raise RecipeError(
                f"has a value that cannot be read: {error.problem}", file=self._file, line=line
            ) from None
        except _UNREADABLE:
            raise RecipeError("has a value that does not suit its tag", file=self._file, line=line) from None
        if isinstance(value, (datetime.date, bytes)):
            return cast("str", cast("yaml.ScalarNode", node).value)
        return cast("Plain", value)

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Plain]:
        found: dict[str, Plain] = {}
        for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("has a key that is not a word", file=self._file, line=line)
            key = cast("str", key_node.value)
            if key in found:
                raise RecipeError("is given twice", file=self._file, line=line, key=key_path((*place, key)))
            self._lines[(*place, key)] = line
            found[key] = self.read(value_node, (*place, key))
        return found


def key_path(place: Place) -> str:
    """A place as people write it: ``warm[0].run``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
