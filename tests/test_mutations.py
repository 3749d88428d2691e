"""The list of mutations itself is sound; running them is `make test-mutations`."""

from pathlib import Path

import pytest

from tests.mutations.__main__ import Mutation, fault, guarantees, mutations


@pytest.mark.parametrize("mutation", mutations(), ids=lambda m: f"{m.area}/{m.name}")
def test_every_mutation_still_applies(mutation: Mutation):
    """A mutation whose text has changed would break nothing and prove nothing."""
    assert fault(mutation) is None


def test_names_are_unique():
    """A name in the output points at one mutation."""
    names = [(m.area, m.name) for m in mutations()]

    assert len(set(names)) == len(names)


def test_a_test_is_named_that_exists():
    """Each mutation names a test file of the tree."""
    root = Path(__file__).parent.parent

    for mutation in mutations():
        for part in mutation.test.split():
            if part.startswith("tests/"):
                assert (root / part.split("::")[0]).is_file(), mutation.name


def test_every_guarantee_is_broken_by_some():
    """All nine have a mutation that exists, so that a test is known to see each of them fail."""
    known = {f"{m.area}/{m.name}" for m in mutations()}

    assert list("123456789") == [name.split()[0] for name in guarantees()]
    for guarantee, names in guarantees().items():
        assert names, guarantee
        assert set() == set(names) - known, guarantee
