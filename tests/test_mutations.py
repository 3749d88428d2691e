"""The list of mutations itself is sound; running them is `make test-mutations`."""

from dataclasses import replace

import pytest

from tests.mutations.__main__ import Mutation, fault, guarantees, mutations


@pytest.mark.parametrize("mutation", mutations(), ids=lambda m: f"{m.area}/{m.name}")
def test_every_mutation_still_applies(mutation: Mutation):
    """A mutation whose text or test has changed would break nothing and prove nothing."""
    assert fault(mutation) is None


def test_names_are_unique():
    """A name in the output points at one mutation."""
    names = [(m.area, m.name) for m in mutations()]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"file": "app/nothing.py"}, "does not exist"),
        ({"old": "nowhere to be found"}, "stands 0 times"),
        ({"new": "DEADLINE = 20.0"}, "changes nothing"),
        ({"new": "if DEADLINE:"}, "unreadable: expected an indented block"),
        ({"file": "tests/parser_cases.json", "old": '[\n  {"name": "format-bom"'}, "unreadable"),
        ({"test": "tests/test_nothing.py"}, "does not exist"),
        ({"test": "tests/test_hub.py::TestNothing::test_a"}, "has no TestNothing::test_a"),
        ({"test": "tests/test_hub.py -k 'owed or nothing_of_this_name'"}, "called nothing_of_this_name"),
    ],
)
def test_a_mutation_that_proves_nothing(changed: dict[str, str], why: str):
    """Nothing to replace, a file that nobody can read, a test that is not there: said before any test runs."""
    sound = Mutation("area", "name", "tests/live.py", "DEADLINE = 20.0", "DEADLINE = 0.0", "tests/test_hub.py -k owed")

    assert fault(sound) is None
    assert why in str(fault(replace(sound, **changed)))


def test_every_guarantee_is_broken_by_some():
    """All nine have a mutation that exists, so that a test is known to see each of them fail."""
    known = {f"{m.area}/{m.name}" for m in mutations()}

    assert list("123456789") == [name.split()[0] for name in guarantees()]
    for guarantee, names in guarantees().items():
        assert names, guarantee
        assert set() == set(names) - known, guarantee
