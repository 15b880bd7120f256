"""``microvm templates …``: what each command prints and does, and how it fails."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from images.catalog import Catalog
from runner_service import cli
from tests.unit.images.catalog_world import digest_of, open_catalog, parent, publish, stand_on, template

MAIN = "octo-org/hello@main"
A, B, C = (digest_of(word) for word in "abc")


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def microvm(*arguments: str) -> Ended:
    """The command as its entry point runs it, in this process: importing it anew takes longer than most of it."""
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", ["microvm", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return Ended(int(leaving.value.code or 0), out.getvalue(), error.getvalue())


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """A template, and the parents of two repositories; one of them has had three versions."""
    catalog = open_catalog(tmp_path)
    base = template(catalog, "t")
    catalog.promote("python-ci", base.digest, "baked")
    for word in "abc":
        parent(catalog, word, on=base, owner="octo-org")
        catalog.promote(MAIN, digest_of(word), f"baked for {word}")
    parent(catalog, "other", repository="octo-org/other", on=base)
    catalog.promote("octo-org/other@main", digest_of("other"), "baked")
    return catalog


def templates(catalog: Catalog, *arguments: str, code: int = 0) -> str:
    ended = microvm("templates", *arguments, "--data-dir", str(catalog.pool.root.parent))
    assert (ended.returncode, "Traceback" in ended.stderr) == (code, False), ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def facts(catalog: Catalog, *arguments: str) -> Any:
    return json.loads(templates(catalog, *arguments, "--json"))


def test_the_list_has_templates_first_and_can_be_narrowed_to_a_repository(catalog: Catalog) -> None:
    lines = templates(catalog).splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "python-ci", MAIN, "octo-org/other@main"]
    assert f"commit {C[:12]} on python-ci" in lines[2]
    listed = {one["name"]: one for one in facts(catalog)}
    assert (listed[MAIN]["owner"], listed[MAIN]["key"]) == ("octo-org", "key-c")
    assert [one["name"] for one in facts(catalog, "--repository", "Octo-Org/hello")] == [MAIN]
    assert len(facts(catalog, "--repository", "octo-org/*")) == 2
    assert "bake --repo" in templates(catalog, "--repository", "octo-org/none")


def test_show_answers_what_is_in_here(catalog: Catalog) -> None:
    labels = {
        "template": "octo-org/hello", "repository": "octo-org/hello", "branch": "main", "commit": "1" * 40,
        "key": "2" * 64, "base": "python-ci", "recipe": '{"packages": ["git"]}',
        "lockfiles": '[["uv.lock", "uv", "3f00"]]', "tools": '{"python": "3.11\\u001b[2J"}',
    }  # fmt: skip
    new = publish(catalog, "new", labels, on=catalog.store.load(digest_of("t")), owner="octo-org")
    catalog.promote(MAIN, new.digest, "baked again")
    stand_on(catalog, new.digest, "vm-7")
    told = templates(catalog, "show", MAIN)
    for words in (
        "1" * 40,
        "2" * 64,
        "uv.lock uv 3f00",
        "for octo-org only",
        "VM vm-7",
        '{"packages":["git"]}',
    ):
        assert words in told
    assert f"{digest_of('t')[:12]} python-ci" in told
    assert "promote" in told and "baked again" in told
    assert "\x1b" not in told
    assert "3.11?[2J" in told
    found = facts(catalog, "show", new.digest[:12])
    assert (found["template"]["name"], found["users"], found["tools"]["python"]) == (
        MAIN,
        ["VM vm-7"],
        "3.11\x1b[2J",
    )
    assert found["bases"] == [{"digest": digest_of("t"), "name": "python-ci", "there": True}]


def test_a_name_is_promoted_and_rolled_back_and_its_history_tells_what_is_left(catalog: Catalog) -> None:
    assert f"{MAIN} means {B[:12]}" in templates(catalog, "rollback", MAIN)
    catalog.store.remove(A)
    rows = facts(catalog, "history", MAIN)
    assert [(row["action"], row["digest"], row["state"]) for row in rows] == [
        ("rollback", B, "current"),
        ("promote", C, "rolled back"),
        ("promote", B, "current"),
        ("promote", A, "gone"),
    ]
    assert facts(catalog, "promote", MAIN, C[:16], "--why", "it was not its fault")["digest"] == C
    assert "it was not its fault" in templates(catalog, "history", MAIN)
    assert catalog.store.names()[MAIN] == C


def test_what_may_go_is_told_then_pruned_and_what_is_pinned_stays(catalog: Catalog) -> None:
    for snapshot in catalog.store.list():
        os.utime(snapshot.path, (1, 1))
    assert facts(catalog, "pin", A) == {"digest": A, "pinned": True}
    dry = facts(catalog, "prune", "--keep", "1", "--dry-run")
    assert [one["digest"] for one in dry["removed"]] == [B]
    assert B in {snapshot.digest for snapshot in catalog.store.list()}
    told = templates(catalog, "prune", "--keep", "1")
    assert B[:12] in told and "more than 1 version" in told
    templates(catalog, "unpin", A)
    told = templates(catalog, "prune", "--budget", "1 MiB")
    assert "nothing to remove" in told
    catalog.pin(C)
    done = facts(catalog, "prune", "--keep", "1", "--budget", "1 MiB")
    assert [one["digest"] for one in done["removed"]] == [A]
    assert {one["digest"]: one["why"] for one in done["stays"]}[C] == "it is pinned"


def test_a_budget_that_cannot_be_met_is_told_with_what_stays(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    template(catalog, "t", size=2 << 20)
    catalog.store.set_name("python-ci", digest_of("t"))
    told = templates(catalog, "prune", "--budget", "1 MiB")
    assert "over the budget" in told
    assert f"python-ci {digest_of('t')[:12]}: it is what template python-ci means now" in told


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "python-cy"], 1, "python-ci"),
        (["history", "octo-org/hello@mian"], 1, MAIN),
        (["rollback", "python-ci"], 1, "no earlier version"),
        (["rollback", A], 2, "is a digest"),
        (["promote", "octo-org/other@main", A], 2, "is a parent of octo-org/hello"),
        (["promote", "../../etc", A], 2, "is no name"),
        (["promote", MAIN], 2, "SNAPSHOT"),
        (["pin", "nothing"], 1, "there is no template"),
        (["prune", "--keep", "0"], 2, "--keep"),
        (["prune", "--budget", "lots"], 2, "512 MiB or 4 GiB"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_an_exit_code(
    catalog: Catalog, arguments: list[str], code: int, words: str
) -> None:
    before = catalog.store.names()
    assert words in templates(catalog, *arguments, code=code)
    assert catalog.store.names() == before


def test_options_before_the_command_are_not_passed_over_in_silence(catalog: Catalog) -> None:
    ended = microvm("templates", "--data-dir", str(catalog.pool.root.parent), "prune", "--keep", "1")
    assert ended.returncode == 2
    assert "after the command" in ended.stderr


def test_without_a_data_directory_there_is_nothing_and_none_is_made(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    ended = microvm("templates", "show", "python-ci", "--data-dir", str(nowhere))
    assert (ended.returncode, "no data directory" in ended.stderr) == (1, True)
    assert json.loads(microvm("templates", "--json", "--data-dir", str(nowhere)).stdout) == []
    assert not nowhere.exists()


def test_every_command_has_help(tmp_path: Path) -> None:
    shown = microvm("templates", "--help").stdout
    for command in ("show", "history", "promote", "rollback", "prune", "pin", "unpin"):
        assert command in shown
        helped = microvm("templates", command, "--help")
        assert (helped.returncode, "--json" in helped.stdout) == (0, True)
