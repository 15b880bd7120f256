"""What a runner may reach: the template's list, the settings' and the forge's API together."""

from pathlib import Path

import msgspec
import pytest

from runner_service.egress import forge_rule, merged
from tests.unit.runner_service.world import TEMPLATE, World
from vmm_core.machine import EgressRule

REGISTRY = EgressRule("registry.example", 443)
MIRROR = EgressRule("mirror.example", 443)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://api.github.com", EgressRule("api.github.com", 443)),
        ("https://GHE.example/api/v3", EgressRule("ghe.example", 443)),
        ("http://ghe.example:8080/api/v3", EgressRule("ghe.example", 8080)),
        ("http://127.0.0.1:8080", None),
        ("http://[::1]:8080", None),
        ("http://localhost:8080", None),
    ],
)
def test_the_forges_endpoint(url: str, rule: EgressRule | None) -> None:
    assert forge_rule(url) == rule


def test_an_endpoint_is_listed_once_and_the_later_list_holds() -> None:
    moved = EgressRule("Registry.example", 443, "127.0.0.1:3141")
    assert merged([REGISTRY, MIRROR], [moved, EgressRule("registry.example", 80)]) == (
        moved, MIRROR, EgressRule("registry.example", 80),
    )  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("of_template", "allowed"),
    [((REGISTRY,), {REGISTRY, MIRROR, EgressRule("ghe.example", 443)}), (None, None)],
)
async def test_what_a_fork_is_given(
    tmp_path: Path,
    anyio_backend: str,
    of_template: tuple[EgressRule, ...] | None,
    allowed: set[EgressRule] | None,
) -> None:
    world = World(tmp_path, templates=(msgspec.structs.replace(TEMPLATE, allow=of_template),))
    async with world.running() as service:
        flow = service.scheduler._flow
        flow._egress, flow._forge_rules = (MIRROR,), {"github": EgressRule("ghe.example", 443)}
        given: list[object] = []
        launch = service.engine.launch

        async def watched(*args, **options):
            given.append(options["allow"])
            return await launch(*args, **options)

        service.engine.launch = watched  # pyright: ignore
        job = world.forge.queue()
        await world.until_quiet()
        story = await service.story(job.id)
    assert [None if one is None else set(one) for one in given] == [allowed]  # pyright: ignore
    said = [line.reason for line in story.timeline if line.step == "forked"]
    assert ("no network card" in said[0]) == (allowed is None)
