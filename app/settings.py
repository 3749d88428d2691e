"""
Every setting: name, unit, range, default and reason. The only reader of os.environ.

The timeout ladder stands here in one place. Durations are seconds and accept
fractions, so that tests run the whole ladder scaled down.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

# Kubernetes gives every pod variables for every Service: SSE_APP_SERVICE_HOST
# and the like, for one that is called sse-app. SSE_APP_PORT holds an address.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=|_PORT=\w+://")

# What a Redis URL may set. Others would override the kit's own timeouts and
# retries, without which a lost connection is not noticed.
_REDIS_OPTIONS = {
    "db": r"\d+",
    "protocol": r"[23]",
    "client_name": r".+",
    "ssl_ca_certs": r".+",
    "ssl_ca_path": r".+",
    "ssl_certfile": r".+",
    "ssl_keyfile": r".+",
    "ssl_cert_reqs": r"none|optional|required",
    "ssl_check_hostname": r"True|False|true|false|1|0",
}
_SENTINEL_OPTIONS = {"sentinel_username": r".+", "sentinel_password": r".+"}
# One host, with or without a port; several stand between commas.
_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^@/?,:\[\]]+)(:\d{1,5})?"
_SENTINEL_URL = re.compile(rf"rediss?\+sentinel://([^@/?]*@)?{_HOST}(,{_HOST})*/[^/?]+(/\d+)?/?(\?.*)?")


# What a token may be signed with, by where the keys come from.
SECRET_ALGORITHMS = ("HS256",)
JWKS_ALGORITHMS = ("RS256", "ES256", "EdDSA")
# RFC 7518, section 3.2.
SECRET_MIN_BYTES = 32

_ORIGIN = re.compile(r"https?://[a-z0-9._-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")


class SettingError(ValueError):
    """
    A setting has a value that it must not have.

    The text is one line: name, rule, value, cure. Start-up ends with it.
    """

    def __init__(self, name: str, rule: str, value: object, cure: str) -> None:
        super().__init__(f"{name} must be {rule}, got {value!r}. {cure}")


@dataclass(frozen=True)
class _Rule:
    kind: str  # "seconds", "count", "choice", "text", "switch"
    about: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()


def _seconds(default: float, low: float, high: float, about: str) -> Any:
    return field(default=default, metadata={"rule": _Rule("seconds", about, low, high)})


def _count(default: int, low: int, high: int, about: str) -> Any:
    return field(default=default, metadata={"rule": _Rule("count", about, low, high)})


def _choice(default: str, choices: tuple[str, ...], about: str) -> Any:
    return field(default=default, metadata={"rule": _Rule("choice", about, choices=choices)})


def _text(default: str, about: str) -> Any:
    return field(default=default, metadata={"rule": _Rule("text", about)})


def _secret(about: str) -> Any:
    return field(default="", repr=False, metadata={"rule": _Rule("text", about)})


def _switch(default: bool, about: str) -> Any:
    return field(default=default, metadata={"rule": _Rule("switch", about)})


@dataclass(frozen=True)
class Settings:
    """All settings of one process. The variable of `max_age_seconds` is `SSE_MAX_AGE_SECONDS`."""

    # --- Where it runs
    env: str = _choice(
        "development", ("development", "production"), "`production` refuses what is only for development."
    )
    auth: str = _choice(
        "none", ("none", "jwt"), "`jwt` asks for a token; `none` lets anybody in and is refused in production."
    )
    host: str = _text("127.0.0.1", "Address to listen on.")
    port: int = _count(8000, 1, 65535, "Port to listen on.")
    metrics_host: str = _text("127.0.0.1", "Address of `/metrics`.")
    metrics_port: int = _count(9090, 0, 65535, "Port of `/metrics`, which is never on the public one. 0: none.")
    loop: str = _choice("uvloop", ("uvloop", "asyncio"), "Event loop.")

    # --- Who may connect
    jwt_secret: str = _secret(
        "Secret of HS256 tokens, 32 bytes or more. A file is better: processes' environments show."
    )
    jwt_secret_file: str = _text("", "File with that secret; read again when it changes.")
    jwks_file: str = _text(
        "", "File with public keys (a JWK Set) for RS256, ES256 and EdDSA; read again when it changes."
    )
    jwks_url: str = _text("", "The same from an `https://…` or `http://…` URL.")
    jwks_refresh_seconds: float = _seconds(300, 1, 86_400, "How often the URL is read again.")
    jwks_cooldown_seconds: float = _seconds(
        10, 0.1, 3_600, "A token with an unknown `kid` has the URL read again, but not more often than this."
    )
    jwt_algorithms: str = _text(
        "", "Allowed algorithms, a part of HS256 (secret) or RS256, ES256, EdDSA (JWKS). Empty: all."
    )
    jwt_audience: str = _text("", "What must be among a token's `aud`. Empty: tokens must carry none.")
    jwt_issuer: str = _text("", "What a token's `iss` must be. Empty: anything.")
    jwt_leeway_seconds: float = _seconds(
        10, 0, 300, "How far clocks may differ when `exp`, `nbf` and `iat` are checked."
    )
    expiring_seconds: float = _seconds(
        60, 0, 3_600, "`stream.expiring` comes this long before a stream's token expires."
    )
    ticket_use_seconds: float = _seconds(30, 0.1, 600, "A ticket must be used for the first time within this.")
    ticket_max_seconds: float = _seconds(
        43_200, 1, 2_592_000, "A ticket ends with the token it was made with, and no later than this."
    )
    cors_origins: str = _text(
        "",
        "Origins of other sites' pages that may use the API, and whose cookies count: `https://a.example https://b.example`.",
    )

    # --- The log
    redis_url: str = _text(
        "",
        "Redis 7 or Valkey, as `redis://…`, `rediss://…` or `unix://…`; behind Sentinels "
        "`redis+sentinel://host:26379,host:26379/master`. Empty: the log is in memory, for one process.",
    )
    key_prefix: str = _text("sse", "All keys begin with `{this}`, so that environments can share a Redis.")
    history_seconds: float = _seconds(600, 0.2, 86_400, "Be back within this time and you miss nothing.")
    log_max_events: int = _count(
        1_000_000, 10, 100_000_000, "Longest log. Reached before `SSE_HISTORY_SECONDS`, it cuts the promise short."
    )
    window_max_bytes: int = _count(134_217_728, 65_536, 1 << 40, "Largest window in the memory of one process.")
    # Redis may be 0.1 s late to say that nothing came, and a waiting read lasts half
    # of this without that (`RedisLog.read`): below 0.3 s it would be a busy loop.
    redis_timeout_seconds: float = _seconds(2, 0.3, 60, "A Redis that is silent for longer is away.")
    publish_timeout_seconds: float = _seconds(3, 0.05, 60, "Longest wait of one publish, retries included.")
    publish_wait_replicas: int = _count(
        0,
        0,
        16,
        "A publish is acknowledged when so many replicas have it, too: it then survives the loss of the master.",
    )
    idempotency_seconds: float = _seconds(600, 1, 86_400, "How long an `Idempotency-Key` is remembered.")

    # --- One stream
    heartbeat_seconds: float = _seconds(
        15, 0.02, 300, "Longest silence on a stream. Keep `proxy_read_timeout` at 4 to 5 times this."
    )
    max_age_seconds: float = _seconds(
        480, 0.2, 86_400, "A stream ends at 80 to 100 % of this. Keep it under nginx's `worker_shutdown_timeout`."
    )
    slow_consumer_seconds: float = _seconds(10, 0.1, 600, "A stream whose client takes nothing for this long ends.")
    send_buffer_bytes: int = _count(
        65_536, 4_096, 16_777_216, "Kernel's send buffer of one stream: what a stalled client can cost."
    )
    retry_ms: int = _count(1_000, 0, 86_400_000, "Clients reconnect after one to two times this.")
    handoff: str = _choice(
        "auto", ("auto", "off"), "`auto` takes a stream's connection over from Hypercorn; `off` never."
    )

    # --- Lifetime
    drain_seconds: float = _seconds(45, 0, 540, "On SIGTERM all streams end spread over this time.")
    drain_lead_seconds: float = _seconds(1, 0, 60, "Between telling clients of the drain and ending the first stream.")

    # --- Runs
    llm_base_url: str = _text(
        "",
        "Where an OpenAI-compatible server has `/chat/completions`, such as `http://localhost:11434/v1`. "
        "Empty: an offline generator answers, and says so.",
    )
    llm_model: str = _text("default", "Model that is asked where a run names none.")
    llm_api_key_file: str = _text("", "File that holds the key of `SSE_LLM_BASE_URL`. Empty: none is sent.")
    llm_silence_seconds: float = _seconds(
        60, 0.05, 600, "A model's server that sends nothing for this long has failed."
    )
    task_root: str = _text("", "Folder below which the task `checksums` may read. Empty: it is not offered.")
    task_modules: str = _text("", "Python modules with tasks of your own, separated by spaces; see `app/task.py`.")
    run_max_seconds: float = _seconds(600, 0.1, 86_400, "A run that takes longer fails.")
    run_finish_seconds: float = _seconds(
        30, 0, 540, "After the drain a process waits this long for its runs to end. Part of the time before SIGKILL."
    )

    # --- Limits
    max_runs: int = _count(100, 1, 100_000, "Most runs that this process makes at once.")
    max_streams: int = _count(15_000, 1, 1_000_000, "Most streams of this process.")
    open_wait_seconds: float = _seconds(
        10, 0.05, 60, "In a storm, opens wait for their turn so long at most; then they get 429 or the soft fail."
    )
    limit_streams_per_user: int = _count(10, 0, 10_000, "Most streams of one user over all processes. 0: no limit.")
    limit_policy: str = _choice(
        "evict",
        ("evict", "reject"),
        "Where a user has too many: `evict` ends the oldest stream, `reject` refuses the new one.",
    )
    lease_seconds: float = _seconds(
        10, 0.3, 300, "The places of a process that died are free after this; it shows three times as often that it lives."
    )
    evicted_retry_seconds: float = _seconds(
        60, 0.05, 86_400, "A client without a place comes back after about this; it then takes a free one or none."
    )
    limit_connects_per_user: int = _count(
        5, 0, 100_000, "New streams per second of one user on this process, after 20 times as many at once. 0: no limit."
    )
    limit_publish_per_user: int = _count(
        1_000,
        0,
        10_000_000,
        "Events per second from one user on this process, after 20 times as many at once. 0: no limit.",
    )
    max_topics: int = _count(50, 1, 10_000, "Most topics of one stream or one event.")
    max_event_bytes: int = _count(1_048_576, 1, 67_108_864, "Largest `data` of one event.")
    max_body_bytes: int = _count(2_097_152, 100, 134_217_728, "Largest body of a request.")
    max_batch_events: int = _count(1_000, 1, 100_000, "Most events of one publish.")

    # --- Answers and logs
    soft_fail: bool = _switch(
        True,
        "Answer a native EventSource `200` with `retry:` where others get 429 or 503: it gives up for ever on any other status.",
    )
    log_format: str = _choice("auto", ("auto", "json", "console"), "`auto`: JSON unless standard error is a terminal.")
    log_level: str = _choice("info", ("debug", "info", "warning", "error"), "Least severe line that is written.")
    log_hash_users: bool = _switch(False, "Write a keyed hash of user ids instead of the ids.")

    def __post_init__(self) -> None:
        if self.env == "production" and self.auth == "none":
            raise SettingError(
                "SSE_AUTH",
                "other than 'none' in production",
                "none",
                "It would let anybody in; set SSE_ENV=development to try things out.",
            )
        self._check_auth()
        if self.heartbeat_seconds * 4 > self.history_seconds:
            raise SettingError(
                "SSE_HEARTBEAT_SECONDS",
                f"at most a quarter of SSE_HISTORY_SECONDS ({self.history_seconds:g})",
                self.heartbeat_seconds,
                "Positions of quiet streams are renewed with heartbeats; lower it or keep more history.",
            )
        if self.heartbeat_seconds > self.max_age_seconds:
            raise SettingError(
                "SSE_HEARTBEAT_SECONDS",
                f"at most SSE_MAX_AGE_SECONDS ({self.max_age_seconds:g})",
                self.heartbeat_seconds,
                "A stream that ends earlier never sends one.",
            )
        if self.max_event_bytes > self.max_body_bytes:
            raise SettingError(
                "SSE_MAX_EVENT_BYTES",
                f"at most SSE_MAX_BODY_BYTES ({self.max_body_bytes})",
                self.max_event_bytes,
                "A larger event would never fit into a request.",
            )
        if not self.key_prefix or any(c in self.key_prefix for c in "{} \r\n"):
            raise SettingError(
                "SSE_KEY_PREFIX",
                "text without braces and spaces",
                self.key_prefix,
                "It becomes the hash tag of all keys.",
            )
        for name in ("host", "metrics_host"):
            if not getattr(self, name):
                raise SettingError(
                    variable(name), "an address", "", "Empty would mean all of them; say 0.0.0.0 or :: for that."
                )
        if self.llm_base_url and not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", self.llm_base_url):
            raise SettingError(
                "SSE_LLM_BASE_URL", "http://… or https://… without a query", self.llm_base_url, "Such as http://localhost:11434/v1."
            )
        if self.task_root and not Path(self.task_root).is_dir():
            raise SettingError("SSE_TASK_ROOT", "a folder", self.task_root, "Make it, or leave it empty.")
        if self.redis_url and (rule := _wrong_redis_url(self.redis_url)):
            raise SettingError(
                "SSE_REDIS_URL", rule, _without_password(self.redis_url), "Leave it empty for a log in memory."
            )

    def _check_auth(self) -> None:
        sources = [name for name in ("jwt_secret", "jwt_secret_file", "jwks_file", "jwks_url") if getattr(self, name)]
        if self.auth == "jwt" and len(sources) != 1:
            raise SettingError(
                "SSE_AUTH",
                "with exactly one of SSE_JWT_SECRET_FILE, SSE_JWT_SECRET, SSE_JWKS_FILE and SSE_JWKS_URL",
                ", ".join(variable(name) for name in sources) or "none of them",
                "Say where the keys are that tokens are verified with.",
            )
        if self.auth == "none" and sources:
            raise SettingError(
                "SSE_AUTH",
                f"'jwt' where {variable(sources[0])} is set",
                self.auth,
                "Else the keys would be there and anybody would get in.",
            )
        if self.jwt_secret and len(self.jwt_secret.encode()) < SECRET_MIN_BYTES:
            raise SettingError(
                "SSE_JWT_SECRET",
                f"at least {SECRET_MIN_BYTES} bytes long (RFC 7518, section 3.2)",
                f"{len(self.jwt_secret.encode())} bytes",
                "Make one: openssl rand -hex 32",
            )
        if self.jwks_url and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.jwks_url):
            raise SettingError(
                "SSE_JWKS_URL", "an https:// or http:// URL", self.jwks_url, "Such as https://id.example/jwks.json."
            )
        allowed = SECRET_ALGORITHMS if self.jwt_secret or self.jwt_secret_file else JWKS_ALGORITHMS
        for name in self.jwt_algorithms.replace(",", " ").split():
            if name not in allowed:
                raise SettingError(
                    "SSE_JWT_ALGORITHMS",
                    f"of {', '.join(allowed)}, which this kind of key can verify",
                    name,
                    "Leave it empty for all of them.",
                )
        for origin in self.origins():
            if not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    "SSE_CORS_ORIGINS",
                    "origins as browsers send them (scheme, host in lower case, port if not the usual one), never *",
                    origin,
                    "Such as https://app.example. Credentials go along, so each one must be named.",
                )

    def origins(self) -> tuple[str, ...]:
        """Return SSE_CORS_ORIGINS one by one."""
        return tuple(self.cors_origins.replace(",", " ").split())
    def llm_api_key(self) -> str:
        """Return what SSE_LLM_API_KEY_FILE holds, without the line end."""
        if not self.llm_api_key_file:
            return ""
        try:
            return Path(self.llm_api_key_file).read_text().strip()
        except OSError as error:
            raise SettingError(
                "SSE_LLM_API_KEY_FILE", f"a file that can be read ({error.strerror})", self.llm_api_key_file, "Mount it."
            ) from None


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """
    Read all settings from the environment.

    Raises:
        SettingError: a value is outside its rule, or an `SSE_` variable is
            none of ours (a misspelt name would otherwise be ignored silently).
    """
    environ = os.environ if environ is None else environ
    known = {variable(name): (name, rule) for name, rule in rules()}
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if not key.startswith("SSE_"):
            continue
        if key not in known:
            if _SERVICE_LINK.search(f"{key}={text}"):
                continue
            # Without its value, which may be a secret: nobody knows what it was meant for.
            raise SettingError(key, "the name of a setting", key, _nearest(key, known))
        name, rule = known[key]
        values[name] = _parse(key, rule, text.strip())
    return Settings(**values)


def rules() -> list[tuple[str, _Rule]]:
    """Return every setting's name with its rule, in the order of the file."""
    return [(f.name, f.metadata["rule"]) for f in fields(Settings)]


def variable(name: str) -> str:
    """Return the environment variable of the setting *name*."""
    return "SSE_" + name.upper()


def _parse(key: str, rule: _Rule, text: str) -> Any:
    if rule.kind == "text":
        return text
    if rule.kind == "switch":
        if text.lower() in ("on", "true", "1", "yes"):
            return True
        if text.lower() in ("off", "false", "0", "no"):
            return False
        raise SettingError(key, "on or off", text, rule.about)
    if rule.kind == "choice":
        if text in rule.choices:
            return text
        raise SettingError(key, "one of " + ", ".join(rule.choices), text, rule.about)
    unit = "seconds, fractions allowed," if rule.kind == "seconds" else "a whole number"
    rule_text = (
        f"{unit} from {rule.low:g} to {rule.high:g}"
        if rule.kind == "seconds"
        else f"{unit} from {int(rule.low)} to {int(rule.high)}"
    )
    try:
        number: float = float(text) if rule.kind == "seconds" else int(text)
    except ValueError:
        raise SettingError(key, rule_text, text, rule.about) from None
    if not rule.low <= number <= rule.high:  # also false for NaN
        raise SettingError(key, rule_text, text, rule.about)
    return number


def _nearest(key: str, known: Mapping[str, object]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]}?" if close else "See the settings in README.md."


def _wrong_redis_url(url: str) -> str | None:
    """Return the rule that *url* breaks, or None."""
    if url.startswith(("redis+sentinel:", "rediss+sentinel:")):
        if not _SENTINEL_URL.fullmatch(url):
            return "redis+sentinel://host:port,host:port/master/number"
        return _wrong_options(url.partition("?")[2], _REDIS_OPTIONS | _SENTINEL_OPTIONS)
    shape = "redis://host:port/number, rediss://…, unix:///path or redis+sentinel://…"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # a port that is no number, half of an IPv6 address
        return shape
    if parts.scheme not in ("redis", "rediss", "unix") or not url.startswith(f"{parts.scheme}://"):
        return shape
    if not (parts.path if parts.scheme == "unix" else re.fullmatch(r"/?\d*", parts.path)):
        return shape
    return _wrong_options(parts.query, _REDIS_OPTIONS)


def _wrong_options(query: str, known: Mapping[str, str]) -> str | None:
    for name, value in parse_qsl(query, keep_blank_values=True):
        if not re.fullmatch(known.get(name, ""), value):
            return f"a URL with no other options than {', '.join(known)}"
    return None


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    rest, query, _ = rest.partition("?")
    if "@" in rest:
        rest = "…@" + rest.rpartition("@")[2]
    return f"{scheme}://{rest}{'?…' if query else ''}"
