"""The table of what repositories lock their dependencies and tools with, and the command each of them means.

One row a kind of file. To teach another: add a row, and a line to the test that reads the table aloud. Within an
ecosystem and a directory the first row found counts. Files of a row without a command are part of the key alone.
"""

import re

import msgspec


class Kind(msgspec.Struct, frozen=True):
    """``files`` are globs of a name, or of the end of a path when they have a slash (its directory is then the
    one above that end). ``run`` is a script for ``/bin/sh -eu`` in that directory; ``needs`` the program it
    cannot do without. With ``{file}`` in it, it runs once a file of the row. ``whole_tree``: one in a directory
    above does the work of those below. ``inherited``: it holds in the directories below. ``timeout`` in seconds."""

    name: str
    ecosystem: str
    files: tuple[str, ...]
    run: str = ""
    needs: str = ""
    whole_tree: bool = False
    inherited: bool = False
    timeout: float = 1800


# A toolchain comes before what is built with it.
TABLE: tuple[Kind, ...] = (
    Kind(
        "mise", "toolchain", (".tool-versions", "mise.toml", ".mise.toml"),
        "mise trust --yes\nmise install --yes", "mise", inherited=True,
    ),
    Kind(
        "rust-toolchain", "rust toolchain", ("rust-toolchain.toml", "rust-toolchain"),
        "rustup show", "rustup", inherited=True,
    ),
    Kind("node-version", "node toolchain", (".nvmrc", ".node-version"), inherited=True),
    Kind("python-version", "python toolchain", (".python-version", ".python-versions"), inherited=True),
    Kind("go-version", "go toolchain", (".go-version",), inherited=True),
    Kind("ruby-version", "ruby toolchain", (".ruby-version",), inherited=True),
    Kind("java-version", "java toolchain", (".java-version", ".sdkmanrc"), inherited=True),
    Kind("pnpm", "node", ("pnpm-lock.yaml",), "pnpm install --frozen-lockfile --prefer-offline", "pnpm"),
    Kind(
        "yarn", "node", ("yarn.lock",),
        'case "$(yarn --version)" in\n'
        "    0.* | 1.*) yarn install --frozen-lockfile --non-interactive --prefer-offline ;;\n"
        "    *) yarn install --immutable ;;\n"
        "esac",
        "yarn",
    ),
    Kind("bun", "node", ("bun.lock", "bun.lockb"), "bun install --frozen-lockfile", "bun"),
    Kind(
        "npm", "node", ("npm-shrinkwrap.json", "package-lock.json"),
        "npm ci --no-audit --no-fund --prefer-offline", "npm",
    ),
    Kind("uv", "python", ("uv.lock",), "uv sync --frozen", "uv"),
    Kind("poetry", "python", ("poetry.lock",), "poetry install --no-interaction --no-root", "poetry"),
    Kind("pdm", "python", ("pdm.lock",), "pdm sync --no-self --no-editable", "pdm"),
    Kind("pipenv", "python", ("Pipfile.lock",), "pipenv sync --dev", "pipenv"),
    # Into the environment that stands first on PATH: what a job without one of its own installs into. One file
    # at a time, as jobs do: hashes in one would be asked of all.
    Kind(
        "pip", "python", ("requirements.txt", "requirements*.txt"),
        "pip install --disable-pip-version-check --no-input --progress-bar off -r {file}", "pip",
    ),
    Kind("pip-constraints", "python constraints", ("constraints*.txt",)),
    Kind("go", "go", ("go.sum", "go.work.sum"), "go mod download", "go"),
    Kind("cargo", "rust", ("Cargo.lock",), "cargo fetch --locked", "cargo"),
    Kind(
        "bundler", "ruby", ("Gemfile.lock", "gems.locked"),
        "BUNDLE_FROZEN=true bundle install --jobs 4 --retry 2", "bundle",
    ),
    Kind(
        "composer", "php", ("composer.lock",),
        "composer install --no-interaction --no-progress --prefer-dist --no-scripts", "composer",
    ),
    Kind(
        "gradle-wrapper", "gradle", ("gradle/wrapper/gradle-wrapper.properties",),
        "sh ./gradlew --no-daemon --console=plain dependencies", "java", whole_tree=True,
    ),
    Kind(
        "gradle", "gradle",
        (
            "gradle.lockfile", "settings-gradle.lockfile", "buildscript-gradle.lockfile",
            "gradle/dependency-locks/*.lockfile",
        ),
        "gradle --no-daemon --console=plain dependencies", "gradle", whole_tree=True,
    ),
    Kind("gradle-versions", "gradle versions", ("gradle/libs.versions.toml", "gradle/verification-metadata.xml")),
    Kind(
        "maven-wrapper", "maven", (".mvn/wrapper/maven-wrapper.properties",),
        "sh ./mvnw --batch-mode --no-transfer-progress dependency:go-offline", "java", whole_tree=True,
    ),
    Kind(
        "maven", "maven", ("pom.xml",),
        "mvn --batch-mode --no-transfer-progress dependency:go-offline", "mvn", whole_tree=True,
    ),
    Kind(
        "mix", "elixir", ("mix.lock",),
        "mix local.hex --force --if-missing\nmix local.rebar --force --if-missing\nmix deps.get", "mix",
    ),
)  # fmt: skip

_BY_NAME = {kind.name: kind for kind in TABLE}
_PLAIN: dict[bytes, Kind] = {}
_GLOBS: list[tuple[re.Pattern[bytes], Kind]] = []
for _kind in TABLE:
    for _file in _kind.files:
        if set(_file) & set("/*"):
            _GLOBS.append(
                (re.compile(rb"(?s:.*/)?" + re.escape(_file.encode()).replace(rb"\*", rb"[^/]*")), _kind)
            )
        else:
            _PLAIN.setdefault(_file.encode(), _kind)
# How the names of files end that some glob may be about: most files are done with after a look at that.
_ENDINGS = (b".txt", b".toml", b".xml", b".properties", b".lockfile")
# What others wrote and somebody copied here: its locks are not this repository's.
_VENDORED = frozenset(
    (b"node_modules", b"vendor", b"bower_components", b".git", b".venv", b"venv", b"site-packages")
)


def kind(name: str) -> Kind | None:
    """The row of that name."""
    return _BY_NAME.get(name)


def kind_of(path: bytes) -> Kind | None:
    """The row of a file of a repository, None for all others. Quick: it is asked for every file there is."""
    name = path[path.rfind(b"/") + 1 :]
    found = _PLAIN.get(name)
    if found is None:
        if not name.endswith(_ENDINGS):
            return None
        found = next((kind for pattern, kind in _GLOBS if pattern.fullmatch(path)), None)
    return None if found is None or is_vendored(path) else found


def is_vendored(path: bytes) -> bool:
    """Whether a directory on the way is one of copied dependencies, or of git's own, or no way at all."""
    parts = path.split(b"/")
    return not _VENDORED.isdisjoint(parts[:-1]) or b".." in parts or b"" in parts
