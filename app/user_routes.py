"""
One user's streams on all processes: to see them, and to end them.
"""

from dataclasses import asdict
from typing import Any

from quart import Blueprint, request

from app.access import check_user
from app.event import EventError
from app.kit import Kit
from app.leases import LeasesUnavailable
from app.log import LogUnavailable
from app.problem import Problem


def add_user_routes(pages: Blueprint, kit: Kit) -> None:
    """Add the routes to *pages*."""

    @pages.get("/users/<path:user>/streams")
    async def list_streams(user: str) -> dict[str, Any]:
        await _admin(user)
        try:
            found = await kit.leases.held(user)
        except LeasesUnavailable as error:
            raise LogUnavailable(str(error)) from error
        return {"user": user, "streams": [asdict(held) for held in found]}

    @pages.delete("/users/<path:user>/streams")
    async def end_streams(user: str) -> dict[str, Any]:
        await _admin(user)
        # Before the streams end: their clients come back at once.
        await kit.tickets.revoke_all(user)
        try:
            count = await kit.leases.revoke(user)
        except LeasesUnavailable as error:
            raise LogUnavailable(str(error)) from error
        kit.logger.info("user_revoked", user=user, streams=count)
        return {"user": user, "ended": count}

    async def _admin(user: str) -> None:
        caller = await kit.access.caller(request.headers, request.args)
        if not caller.admin or caller.carrier == "ticket":
            raise Problem(
                403,
                "forbidden",
                "token",
                "must hold the claim sse.admin",
                None,
                "Ask with an administrator's token.",
            )
        try:
            check_user(user)
        except EventError as error:
            raise Problem.of(error) from None
