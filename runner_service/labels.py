"""Which template a job's labels ask for, or why none can serve them. Pure."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from runner_service.domain import Scope, Template

OURS = "microvm"
COMPANIONS = ("self-hosted", "linux", "x64")


class Serve(msgspec.Struct, frozen=True):
    """``template`` serves the job; ``labels`` are what its runner must be registered with."""

    template: Template
    labels: tuple[str, ...]


class Foreign(msgspec.Struct, frozen=True):
    """The job names none of our labels: not ours to serve."""


class Unservable(msgspec.Struct, frozen=True):
    """The job is ours, but no template serves this combination. ``reason`` is one sentence."""

    code: str
    reason: str


def is_ours(labels: Iterable[str]) -> bool:
    """Whether any label is ``microvm`` or starts with ``microvm-``; forges compare without case."""
    return any(_is_our_label(label.lower()) for label in labels)


def registered_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The job's labels and the three every runner here has; GitHub registers only what is sent."""
    seen: dict[str, str] = {}
    for label in (*labels, *COMPANIONS):
        seen.setdefault(label.lower(), label)
    return tuple(seen.values())


def group_key(forge: str, scope_key: str, template: str, labels: Sequence[str]) -> str:
    """One string for (forge, scope, label set, template): jobs and runners with the same key are alike."""
    return "|".join((forge, scope_key, template, ",".join(sorted({label.lower() for label in labels}))))


class Group(msgspec.Struct, frozen=True):
    """What a ``group_key`` says; the labels are in lower case."""

    forge: str
    scope_key: str
    template: str
    labels: tuple[str, ...]

    @property
    def scope(self) -> Scope:
        kind, _, path = self.scope_key.partition(":")
        return msgspec.convert({"kind": kind, "path": path}, Scope)


def group_of(key: str) -> Group:
    """The parts of a group's key. None of them but the last may hold its separator: forges allow no ``|`` in names."""
    forge, scope_key, template, labels = key.split("|", 3)
    return Group(forge, scope_key, template, tuple(labels.split(",")))


def choose(
    labels: Sequence[str],
    templates: Sequence[Template],
    *,
    default: str,
    extra: Sequence[str] = (),
    asked: Mapping[str, str] | None = None,
) -> Serve | Foreign | Unservable:
    """Decide what serves ``labels``.

    ``microvm`` alone means ``default``. ``microvm-X`` means the template named X, or one that lists X (or
    ``microvm-X``) among its labels. Any other label must be a companion, listed by the template, or in ``extra``.
    ``asked`` is what the job's repository says of itself: label (lower case) → the template it means there.
    """
    if not is_ours(labels):
        return Foreign()
    asked = asked or {}
    if asked:
        templates = [
            _with_labels(t, [label for label, name in asked.items() if name == t.name]) for t in templates
        ]
    wanted = dict.fromkeys(label.lower() for label in labels)
    ours = [label for label in wanted if _is_our_label(label)]
    candidates = [t for t in templates if t.runner_dir is not None]
    for label in ours:
        if label == OURS:
            continue
        named = [t for t in candidates if _answers_to(t, label)]
        if not named:
            return Unservable("no_template", _no_template(label, templates))
        candidates = named
    accepted = {*ours, *COMPANIONS, *(label.lower() for label in extra)}
    others = [label for label in wanted if label not in accepted]
    for label in others:
        listed = [t for t in candidates if label in _listed(t)]
        if not listed:
            return Unservable(
                "unknown_label",
                f"the label '{label}' beside {_quoted(ours)} is served by no template; "
                "add it to the template's labels or to runners.extra_labels",
            )
        candidates = listed
    explicit = any(label != OURS for label in ours) or bool(others)
    meant = asked.get(OURS, default)
    default = meant if any(t.name == meant for t in candidates) else default
    best = _best(candidates, ours, default, explicit=explicit)
    if best is None:
        return Unservable("no_template", _no_template(OURS, templates, default))
    return Serve(best, registered_labels(labels))


def _best(
    candidates: Sequence[Template], ours: Sequence[str], default: str, *, explicit: bool
) -> Template | None:
    by_name = {t.name: t for t in candidates}
    for label in ours:
        exact = by_name.get(label.removeprefix(f"{OURS}-"))
        if exact is not None:
            return exact
    if default in by_name:
        return by_name[default]
    if not explicit:
        return None
    return min(candidates, key=lambda t: (t.need_mib, t.name), default=None)


def _is_our_label(label: str) -> bool:
    return label == OURS or label.startswith(f"{OURS}-")


def _with_labels(template: Template, more: Sequence[str]) -> Template:
    return msgspec.structs.replace(template, labels=(*template.labels, *more)) if more else template


def _listed(template: Template) -> frozenset[str]:
    return frozenset(label.lower() for label in template.labels)


def _answers_to(template: Template, label: str) -> bool:
    short = label.removeprefix(f"{OURS}-")
    listed = _listed(template)
    return template.name.lower() == short or label in listed or short in listed


def _no_template(label: str, templates: Sequence[Template], default: str | None = None) -> str:
    have = ", ".join(sorted(t.name for t in templates if t.runner_dir is not None)) or "none"
    if default is not None:
        return f"no template for label '{label}': the default template '{default}' is not baked (with a runner: {have})"
    short = label.removeprefix(f"{OURS}-")
    if any(t.name.lower() == short and t.runner_dir is None for t in templates):
        return (
            f"no template for label '{label}': the template '{short}' holds no runner (with a runner: {have})"
        )
    return f"no template for label '{label}' (with a runner: {have})"


def _quoted(labels: Iterable[str]) -> str:
    return ", ".join(f"'{label}'" for label in labels)
