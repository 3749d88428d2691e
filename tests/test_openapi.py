"""The description is true: every route is in it, and every answer is one that it tells of."""

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.factory import create_app
from app.hub import Hub
from app.openapi import document
from app.settings import Settings
from app.stream import Stream
from tests.inside import Inside
from tests.live import ask
from tests.signing import SECRET, bearer, token

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
RIGHTS = {"subscribe": ["*"], "publish": ["*"], "admin": True}
AUTH: dict[str, dict[str, Any]] = {"none": {}, "jwt": {"auth": "jwt", "jwt_secret": SECRET}}
# Most requests that are made of one operation and mode.
EXAMPLES = 25


class TestDocument:
    @pytest.mark.parametrize("auth", AUTH)
    def test_valid(self, auth):
        """It is OpenAPI 3.1, with authentication and without."""
        OpenAPIV31SpecValidator(document(Settings(**AUTH[auth]))).validate()

    def test_every_route(self):
        """Each route and method of the application is in it, and no other."""
        routes = {
            (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
            for rule in create_app(Settings()).url_map.iter_rules()
            for method in rule.methods - {"OPTIONS"}
        }
        described = {(path, method) for path, methods in document(Settings())["paths"].items() for method in methods}

        assert routes == described

    async def test_served(self, modes):
        """It is to be had where everybody looks for it."""
        server, described = modes["jwt"]
        answer = await ask(server.port, "GET", "/openapi.json")

        assert (200, described) == (answer.status, answer.json)


@pytest.fixture(scope="module")
def modes():
    """A process of each mode with what it says of itself; its streams end after `stream.open`."""
    # What a stream carries later is others' business; here each answer has an end.
    with Inside(**AUTH["none"]) as none, Inside(**AUTH["jwt"]) as jwt:
        for server in (none, jwt):
            server.call(lambda server=server: brief(server.kit.hub))
        yield {"none": (none, document(none.kit.settings)), "jwt": (jwt, document(jwt.kit.settings))}


def brief(hub: Hub) -> None:
    """Let every stream of *hub* end as soon as it has begun."""
    add = hub.add

    def add_and_end(stream: Stream, preamble: bytes) -> None:
        add(stream, preamble)
        hub.end(stream, "max_age")

    hub.add = add_and_end  # type: ignore[method-assign]


OPERATIONS = [(method.upper(), path) for path, methods in document(Settings())["paths"].items() for method in methods]


class TestAnswers:
    @pytest.mark.parametrize("mode", AUTH)
    @pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
    def test_generated_requests(self, modes, mode, method, path):
        """Right and wrong requests of every kind: no 5xx, no status, type or body that is not described."""
        server, described = modes[mode]
        operation = schemathesis.openapi.from_dict(described)[path][method]
        headers = bearer(token(seconds=3600, **RIGHTS)) if mode == "jwt" else {}

        # A path takes any text: there must be something else that could be wrong.
        kinds = [schemathesis.GenerationMode.POSITIVE]
        parameters = operation.definition.raw.get("parameters", [])
        if operation.body or any(each["in"] != "path" for each in parameters):
            kinds.append(schemathesis.GenerationMode.NEGATIVE)
        for generation in kinds:

            def check(case: Any) -> None:
                response = case.call(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=20)
                case.validate_response(response, checks=CHECKS)

            run(operation, generation, check)

    def test_streams_were_opened(self, modes):
        """The generated requests were not all refused."""
        server, _ = modes["none"]
        operation = schemathesis.openapi.from_dict(document(server.kit.settings))["/events"]["GET"]
        statuses = set()

        def check(case: Any) -> None:
            response = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=20)
            statuses.add(response.status_code)
            if response.status_code == 200:
                assert b"event: stream.open\n" in response.content

        run(operation, schemathesis.GenerationMode.POSITIVE, check)
        assert 200 in statuses


def run(operation: Any, mode: Any, check: Any) -> None:
    """Call *check* with generated requests of *operation*, always the same ones."""
    strategy = operation.as_strategy(generation_mode=mode)
    wrapped = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    wrapped(given(strategy)(check))()
