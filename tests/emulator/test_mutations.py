"""The tests of the kernels catch planted bugs: a suite that cannot fail would catch none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from emulator import build
from emulator.mutations import Mutation, outcome, planted

MUTATIONS = planted()
# Every tenth one, for the time that they take together; MOA_MUTATIONS=all takes the others too.
CHOSEN = MUTATIONS if os.environ.get("MOA_MUTATIONS") == "all" else MUTATIONS[::10]

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future]]:
    """All of them at once: most of the time goes into compiling."""
    for variant in build.VARIANTS:
        build.build(variant)
    with ThreadPoolExecutor(build.jobs()) as pool:
        yield {mutation.name: pool.submit(outcome, mutation) for mutation in CHOSEN}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutation", CHOSEN, ids=lambda mutation: mutation.name)
def test_planted_bug_is_caught(mutation: Mutation, outcomes: dict[str, Future]) -> None:
    caught, said = outcomes[mutation.name].result()
    assert caught, f"{mutation.way} should have failed with {mutation.says!r}:\n{said}"


def test_every_bug_can_be_planted() -> None:
    for mutation in MUTATIONS:
        assert mutation.text()


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
