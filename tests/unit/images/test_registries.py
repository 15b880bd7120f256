"""What a guest is opened to when a recipe says package-registries, and the pip.conf it gets."""

from images import registries
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
