"""What can go wrong on the way from a recipe to a template.

    ImageError
    ├── RecipeError      a recipe says something that cannot be: file, line, key, what is allowed
    ├── BuildFailed      this host could not build a part: a tool is missing, a download or a program failed
    ├── BakeFailed       a step of the bake failed: its name, its last output, what to do
    ├── NoEarlierVersion   a name has no version left to go back to
    └── CatalogBusy        another process has been changing the catalog for too long

Nothing that looks like a template or a finished cache entry exists after any of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class ImageError(Exception):
    """Root of the errors of this package."""

    code: ClassVar[str] = "image_error"


class RecipeError(ImageError):
    """A recipe, or an override of one, is wrong. ``line`` counts from 1; None when no line is to blame."""

    code: ClassVar[str] = "recipe_invalid"

    def __init__(self, message: str, *, file: Path | str, line: int | None = None, key: str = "") -> None:
        where = f"{file}:{line}" if line is not None else str(file)
        super().__init__(f"{where}: {key}: {message}" if key else f"{where}: {message}")
        self.message = message
        self.file = str(file)
        self.line = line
        self.key = key


class BuildFailed(ImageError):
    """A program on this host failed or is missing. ``output`` holds its last lines."""

    code: ClassVar[str] = "build_failed"

    def __init__(self, message: str, *, output: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  | {line}" for line in output)]))
        self.message = message
        self.output = tuple(output)


class BakeFailed(ImageError):
    """A step of a bake failed. ``status`` is the exit status of a warm step's command, when there is one."""

    code: ClassVar[str] = "bake_failed"

    def __init__(
        self, step: str, message: str, *, advice: str, status: int | None = None, output: Sequence[str] = ()
    ) -> None:
        lines = [f"step {step!r} failed: {message}", *(f"  | {line}" for line in output), advice]
        super().__init__("\n".join(lines))
        self.step = step
        self.message = message
        self.advice = advice
        self.status = status
        self.output = tuple(output)


class NoEarlierVersion(ImageError):
    """There is nothing a name could be rolled back to."""

    code: ClassVar[str] = "no_earlier_version"


class CatalogBusy(ImageError):
    """The catalog's lock was not to be had in time."""

    code: ClassVar[str] = "catalog_busy"


class MirrorError(ImageError):
    """``output`` holds git's last lines. No message holds the user or password of an address."""

    code: ClassVar[str] = "mirror_failed"

    def __init__(self, message: str, *, output: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  | {line}" for line in output)]))
        self.message = message
        self.output = tuple(output)


class BadRepositoryUrl(MirrorError):
    code: ClassVar[str] = "repository_url_invalid"


class RepositoryUnreachable(MirrorError):
    code: ClassVar[str] = "repository_unreachable"


class RepositoryDenied(MirrorError):
    code: ClassVar[str] = "repository_denied"


class RepositoryEmpty(MirrorError):
    code: ClassVar[str] = "repository_empty"


class RepositoryTooLarge(MirrorError):
    code: ClassVar[str] = "repository_too_large"


class RepositoryTimedOut(MirrorError):
    code: ClassVar[str] = "repository_timed_out"


class MirrorDamaged(MirrorError):
    code: ClassVar[str] = "mirror_damaged"


class BadRef(MirrorError):
    code: ClassVar[str] = "bad_ref"
