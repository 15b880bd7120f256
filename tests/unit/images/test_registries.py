"""What a guest is opened to when a recipe says package-registries, and the pip.conf and npmrc it gets."""

import pytest

from images import registries
from images.errors import BuildFailed
from images.registries import PipIndex
from vmm_core.machine import EgressRule


def test_one_rule_per_host_and_port():
    urls = [
        "https://index.example/simple",
        "https://files.example/a/b.whl",
        "https://files.example/c.whl",
        "http://mirror.example:8080/x",
        "file:///opt/wheels/a.whl",
    ]
    assert registries.endpoints(urls) == (
        EgressRule("index.example", 443),
        EgressRule("files.example", 443),
        EgressRule("mirror.example", 8080),
    )


def test_the_guest_gets_an_index_only_where_it_is_not_the_default_one():
    default = PipIndex(url="https://index.example/simple", default=True)
    own = PipIndex(url="https://own.example/simple", default=False)
    assert b"index-url" not in registries.pip_conf(default, local_ca=False)
    assert b"index-url = https://own.example/simple\n" in registries.pip_conf(own, local_ca=False)
    assert b"cert =" not in registries.pip_conf(None, local_ca=False)
    assert b"cert = /etc/ssl/certs/ca-certificates.crt\n" in registries.pip_conf(None, local_ca=True)


def test_the_guests_npm_asks_where_the_hosts_does():
    written = registries.npmrc("https://npm.example/", local_ca=True)
    assert b"registry=https://npm.example/\n" in written
    assert b"cafile=/etc/ssl/certs/ca-certificates.crt\n" in written
    assert b"cafile" not in registries.npmrc("https://npm.example/", local_ca=False)


def npm_that_says(monkeypatch: pytest.MonkeyPatch, directory, *answers: str) -> None:
    """A program called npm that gives one answer a call, of the address's kind it is asked for."""
    get, view = answers
    script = f'#!/bin/sh\ncase "$1" in config) echo "{get}" ;; view) {view} ;; esac\n'
    (directory / "npm").write_text(script)
    (directory / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.anyio
async def test_npms_registry_and_the_host_of_its_files(monkeypatch, tmp_path):
    npm_that_says(monkeypatch, tmp_path, "https://npm.example/", "echo https://files.example/npm.tgz")
    assert await registries._node_urls() == ["https://npm.example/", "https://files.example/npm.tgz"]
    npm_that_says(monkeypatch, tmp_path, "https://npm.example/", "exit 1")
    assert await registries._node_urls() == ["https://npm.example/"]


@pytest.mark.anyio
async def test_a_token_in_the_registrys_address_does_not_reach_a_template(monkeypatch, tmp_path):
    npm_that_says(monkeypatch, tmp_path, "https://user:secret@npm.example/", "exit 1")
    with pytest.raises(BuildFailed, match="password") as caught:
        await registries.npm_registry()
    assert "secret" not in str(caught.value)


@pytest.mark.anyio
async def test_a_host_without_npm_opens_nothing_of_npms(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await registries.npm_registry() is None
    assert await registries._node_urls() == []
