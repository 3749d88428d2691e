"""
Tickets, and new rights for a stream that is open.
"""

from typing import Any

from quart import Blueprint, request

from app.access import Caller, refuse
from app.kit import Kit
from app.problem import Problem


def add_ticket_routes(pages: Blueprint, kit: Kit) -> None:
    """Add the routes to *pages*."""
    settings = kit.settings

    @pages.post("/tickets")
    async def make_ticket() -> tuple[dict[str, Any], int, dict[str, str]]:
        caller = await _bearer(kit)
        ticket = await kit.tickets.make(caller)
        answer = {
            "ticket": ticket.text,
            "use_within_seconds": settings.ticket_use_seconds,
            "expires_at": ticket.expires_at,
        }
        return answer, 201, {"Cache-Control": "no-store"}

    @pages.delete("/tickets")
    async def revoke_ticket() -> tuple[str, int]:
        text = request.args.get("ticket")
        if text is None:
            raise Problem(400, "invalid", "ticket", "must be there", None, "Name the one that ends: ?ticket=…")
        # Whoever has it may end it. One that is over already is no mistake.
        served = await kit.tickets.revoke(text)
        if served is not None:
            await kit.control.end(served, "revoked")
        return "", 204

    @pages.post("/streams/<stream>/token")
    async def renew_stream(stream: str) -> tuple[dict[str, Any], int]:
        caller = await _bearer(kit)
        done = await kit.control.renew(stream, caller)
        if not done.found:
            # The same for one of somebody else: a stranger does not learn which there are.
            raise Problem(
                404,
                "no-stream",
                "stream",
                "must be an open one of this user",
                stream,
                "Its id is in `stream.open`; where it has ended, open a new one with the new token.",
            )
        if done.refused:
            raise Problem(
                403,
                "forbidden",
                "topic",
                "is carried by the stream and must be contained in a pattern of the new token",
                done.refused,
                "Open a stream with fewer topics; this one goes on until its old token expires.",
            )
        if done.ticket:
            await kit.tickets.renew(done.ticket, caller)
        return {"stream": stream, "expires_at": caller.expires_at}, 200


async def _bearer(kit: Kit) -> Caller:
    """Return who asks, by something better than a ticket: one must not prolong itself."""
    caller = await kit.access.caller(request.headers, request.args)
    if caller.carrier == "ticket":
        refuse("ticket", "must not be what asks for this", cure="Send the token itself: Authorization: Bearer.")
    return caller
