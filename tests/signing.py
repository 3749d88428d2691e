"""
Tokens and the keys they are signed with, right ones and wrong ones.
"""

import base64
import hmac
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

SECRET = "a secret of tests that is long enough"
ALGORITHMS = ("RS256", "ES256", "EdDSA")


@cache
def private_key(algorithm: str, name: str = "one") -> Any:
    """Return a key pair; the same one for the same arguments."""
    if algorithm == "RS256":
        return rsa.generate_private_key(65_537, 2048)
    return ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else ed25519.Ed25519PrivateKey.generate()


def public_pem(algorithm: str) -> bytes:
    """Return the public key as everybody may have it."""
    return (
        private_key(algorithm)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def jwk(algorithm: str, name: str = "one", **more: object) -> dict[str, Any]:
    """Return the public key as a JWK, its `kid` made of both arguments."""
    written = jwt.get_algorithm_by_name(algorithm).to_jwk(private_key(algorithm, name).public_key(), as_dict=True)
    written.pop("key_ops", None)
    return {**written, "kid": f"{algorithm}-{name}", "use": "sig", **more}


def jwks(*keys: dict[str, Any]) -> str:
    """Return a JWK Set of *keys*, or of one key for each algorithm."""
    return json.dumps({"keys": list(keys) or [jwk(algorithm) for algorithm in ALGORITHMS]})


def claims(sub: object = "alice", *, seconds: float = 86_400, **more: Any) -> dict[str, Any]:
    """Return claims; *subscribe*, *publish* and *admin* go into `sse`, others stand for themselves."""
    rights = {name: more.pop(name) for name in ("subscribe", "publish", "admin") if name in more}
    return {"sub": sub, "exp": int(time.time() + seconds), **({"sse": rights} if rights else {}), **more}


def token(sub: object = "alice", **more: Any) -> str:
    """Return a token that is signed with the secret."""
    return sign(claims(sub, **more))


def sign(payload: object, *, header: dict[str, Any] | None = None, secret: str | bytes = SECRET) -> str:
    """Return a token of any JSON, with any header, by HMAC: nothing is checked here."""
    key = secret.encode() if isinstance(secret, str) else secret
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signed = f"{_part(json.dumps(header or {'alg': 'HS256', 'typ': 'JWT'}).encode())}.{_part(body)}"
    return f"{signed}.{_part(hmac.digest(key, signed.encode(), 'sha256'))}"


def sign_by(algorithm: str, name: str = "one", *, header: dict[str, Any] | None = None, **more: Any) -> str:
    """Return a token that is signed with a private key; its `kid` says which."""
    return jwt.encode(
        claims(**more), private_key(algorithm, name), algorithm, headers={"kid": f"{algorithm}-{name}"} | (header or {})
    )


def bearer(text: str) -> dict[str, str]:
    """Return the header that carries a token."""
    return {"Authorization": f"Bearer {text}"}


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
