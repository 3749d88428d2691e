"""
Runs of the kind `chat`: a model's answer, token by token.

The tokens come from any server that speaks OpenAI's chat completions
(SSE_LLM_BASE_URL). Without one an offline generator answers, and says what it
is. Whatever an upstream does wrong becomes one clear `run.failed`.
https://platform.openai.com/docs/api-reference/chat/streaming
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import httpx2
import structlog

from app.parser import EventTooLong, Parser
from app.problem import Problem
from app.runs import RunFailure, Teller, Work

_ROLES = ("system", "user", "assistant")
_FIELDS = frozenset({"kind", "prompt", "messages", "model", "max_tokens", "temperature"})
# Longest refusal of an upstream that is read.
_REFUSAL_BYTES = 4_096
_EVENT_BYTES = 1_048_576
# The last event's data. After it only the end of the body may come.
_DONE = "[DONE]"
# Longest wait for that end, which mostly comes in the same packet.
_END_SECONDS = 0.1
# The offline generator's pace: that of a model which one can read along with.
_WORD_SECONDS = 0.03


class Chat:
    """
    Answers by a model.

    Args:
        base_url: where `/chat/completions` is; empty: the offline generator.
        api_key: sent as a bearer, unless empty.
        silence_seconds: longest wait for the head and for each piece after it.
    """

    def __init__(self, base_url: str, model: str, api_key: str, silence_seconds: float) -> None:
        self._url = base_url.rstrip("/") + "/chat/completions" if base_url else ""
        self._model = model
        self._headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._silence = silence_seconds
        self._client: httpx2.AsyncClient | None = None

    def prepare(self, body: dict[str, Any]) -> Work:
        """Return the work that answers *body*; raise a Problem where it asks for none."""
        request = _request(body, self._model)
        if not self._url:
            return lambda teller: _offline(request, teller)
        return lambda teller: self._ask(request, teller)

    async def close(self) -> None:
        """Let go of the connections to the upstream."""
        if self._client is not None:
            await self._client.aclose()

    async def _ask(self, request: dict[str, Any], teller: Teller) -> dict[str, Any]:
        answer = _Answer(request["model"])
        try:
            async for text in self._stream(request):
                if text == _DONE:
                    answer.done = True
                elif token := answer.take(text):
                    await teller.token(token)
        except TimeoutError:
            raise RunFailure(
                "upstream_silent",
                "upstream",
                f"must send something every SSE_LLM_SILENCE_SECONDS ({self._silence:g})",
                None,
                "Try again; if it stays, look at the model's server.",
            ) from None
        except httpx2.TransportError as error:
            raise RunFailure(
                "upstream_broken" if answer.tokens else "upstream_unreachable",
                "upstream",
                "must answer to its end" if answer.tokens else "must be reachable",
                type(error).__name__,
                "Try again; if it stays, check SSE_LLM_BASE_URL and the model's server.",
            ) from None
        except (EventTooLong, httpx2.DecodingError) as error:
            raise _broken(str(error)) from None
        if not answer.done and answer.finish is None:
            raise _broken("the stream ended early")
        return answer.result()

    async def _stream(self, request: dict[str, Any]) -> AsyncGenerator[str]:
        """Yield the data of each event of the upstream's answer."""
        if self._client is None:
            # SSE_MAX_RUNS bounds them.
            self._client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_keepalive_connections=20))
        built = self._client.build_request("POST", self._url, json={**request, "stream": True}, headers=self._headers)
        async with asyncio.timeout(self._silence):
            response = await self._client.send(built, stream=True)
        try:
            if response.status_code != 200:
                raise await _refused(response, self._silence)
            kind = response.headers.get("Content-Type", "")
            if not kind.lower().startswith("text/event-stream"):
                raise _broken(f"Content-Type must be text/event-stream, got {kind!r}")
            parser = Parser(max_event_bytes=_EVENT_BYTES)
            chunks = response.aiter_bytes()
            while True:
                async with asyncio.timeout(self._silence):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                for event in parser.feed(chunk):
                    yield event.data
                    if event.data == _DONE:
                        await _read_end(chunks)
                        return
        finally:
            # Also when the run was cancelled: the upstream hears it at once.
            await response.aclose()


class _Answer:
    """What an upstream has said so far."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.tokens = 0
        self.characters = 0
        self.finish: str | None = None
        self.usage: object = None
        self.done = False

    def take(self, text: str) -> str:
        """Read one event's data; return the text that it adds."""
        try:
            piece = json.loads(text)
        except (ValueError, RecursionError):
            raise _broken(f"each event must be JSON, got {text[:100]!r}") from None
        if not isinstance(piece, dict):
            raise _broken(f"each event must be an object, got {text[:100]!r}")
        if piece.get("error"):
            error = piece["error"]
            said = error.get("message") if isinstance(error, dict) else error
            raise _broken(f"it said: {said}")
        if isinstance(piece.get("usage"), dict):
            self.usage = piece["usage"]
        choices = piece.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ""  # usage, or a filter's notes
        delta = choices[0].get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(choices[0].get("finish_reason"), str):
            self.finish = choices[0]["finish_reason"]
        if not isinstance(content, str) or not content:
            return ""
        self.tokens += 1
        self.characters += len(content)
        return content

    def result(self) -> dict[str, Any]:
        """Return what `run.done` carries."""
        result: dict[str, Any] = {"finish": self.finish or "stop", "tokens": self.tokens, "model": self.model}
        return {**result, "usage": self.usage} if self.usage else result


def _request(body: dict[str, Any], model: str) -> dict[str, Any]:
    """Return what the upstream is asked, all of it checked."""

    def wrong(name: str, rule: str, cure: str) -> Problem:
        return Problem(400, "invalid", name, rule, body.get(name), cure)

    for name in body:
        if name not in _FIELDS:
            raise wrong(name, "is not a field of a chat", f"Fields: {', '.join(sorted(_FIELDS))}.")
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise wrong("prompt", "must be given, or else messages", 'Send {"kind": "chat", "prompt": "Hello"}.')
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise wrong("prompt", "must be a text", 'Send {"kind": "chat", "prompt": "Hello"}.')
        messages = [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be an array of at least one message", 'Such as [{"role": "user", "content": "Hello"}].')
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or message["role"] not in _ROLES
            or not isinstance(message["content"], str)
        ):
            raise Problem(
                400,
                "invalid",
                "messages",
                f"must each have a role ({', '.join(_ROLES)}) and a content that is a text",
                message,
                'Such as {"role": "user", "content": "Hello"}.',
            )
    request: dict[str, Any] = {"model": body.get("model", model), "messages": messages}
    if not isinstance(request["model"], str) or not 1 <= len(request["model"]) <= 200:
        raise wrong("model", "must be a name of 1 to 200 characters", "Leave it out for SSE_LLM_MODEL.")
    most = body.get("max_tokens")
    if most is not None:
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= 1_000_000:
            raise wrong("max_tokens", "must be a whole number from 1 to 1000000", "Leave it out for the model's own.")
        request["max_tokens"] = most
    heat = body.get("temperature")
    if heat is not None:
        if isinstance(heat, bool) or not isinstance(heat, int | float) or not 0 <= heat <= 2:
            raise wrong("temperature", "must be a number from 0 to 2", "Leave it out for the model's own.")
        request["temperature"] = heat
    return request


async def _offline(request: dict[str, Any], teller: Teller) -> dict[str, Any]:
    """Answer without any model, saying so."""
    asked = next((each["content"] for each in reversed(request["messages"]) if each["role"] == "user"), "")
    text = (
        "This is the kit's offline generator, not a model: it understands nothing. "
        "Set SSE_LLM_BASE_URL to any server that speaks OpenAI's chat completions, and it answers here instead. "
        f"You wrote {len(asked.split())} words: {asked}"
    )
    words = text.split(" ")[: request.get("max_tokens")]
    for number, word in enumerate(words):
        await teller.token(f" {word}" if number else word)
        await asyncio.sleep(_WORD_SECONDS)
    return {"finish": "stop", "tokens": len(words), "model": "offline generator"}


async def _read_end(chunks: AsyncIterator[bytes]) -> None:
    """Read the end of a whole answer: else its connection could not serve the next run."""
    with suppress(TimeoutError, httpx2.TransportError):
        async with asyncio.timeout(_END_SECONDS):
            await anext(chunks, None)


async def _refused(response: httpx2.Response, silence: float) -> RunFailure:
    """Return what the upstream's refusal means."""
    status, body = response.status_code, b""
    async with asyncio.timeout(silence):
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) >= _REFUSAL_BYTES:
                break
    said = body[:_REFUSAL_BYTES].decode("utf-8", "replace")
    try:
        error = json.loads(said)["error"]
        said = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    structlog.get_logger().warning("upstream_refused", status=status, said=said[:500])
    if status in (401, 403):
        # Its text may hold parts of the key, which is the kit's and no reader's.
        return RunFailure(
            "upstream_refused", "upstream", "must accept the kit's key", status, "Check SSE_LLM_API_KEY_FILE."
        )
    if status == 429:
        return RunFailure("upstream_busy", "upstream", "must have room", status, f"Try again later. It said: {said[:150]}")
    return RunFailure("upstream_refused", "upstream", "must answer 200", status, f"It said: {said[:150]}")


def _broken(why: str) -> RunFailure:
    return RunFailure(
        "upstream_broken",
        "upstream",
        "must stream a whole answer as OpenAI's chat completions",
        why[:200],
        "Try again; if it stays, look at the model's server.",
    )
