"""
A name server for one name, which answers as a test wants.

UDP, A records, RFC 1035; what nginx asks, and no more.
"""

import asyncio
import struct
from dataclasses import dataclass, field
from typing import Self

NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3


@dataclass
class NameServer(asyncio.DatagramProtocol):
    """
    Answers every question with `addresses`.

    Attributes:
        code: NOERROR, SERVFAIL or NXDOMAIN.
        silent: answer nothing at all.
        asked: names, in the order of the questions.
    """

    addresses: list[str] = field(default_factory=list)
    code: int = NOERROR
    silent: bool = False
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @classmethod
    async def start(cls, *addresses: str, host: str = "127.0.0.1") -> Self:
        """Return a server on a free port."""
        server = cls(list(addresses))
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, local_addr=(host, 0))
        return server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def close(self) -> None:
        self._transport.close()

    def datagram_received(self, data: bytes, source: tuple[str, int]) -> None:
        labels, at = [], 12
        while size := data[at]:
            labels.append(data[at + 1 : at + 1 + size].decode())
            at += 1 + size
        question, kind = data[12 : at + 5], struct.unpack("!H", data[at + 1 : at + 3])[0]
        self.asked.append(".".join(labels))
        if self.silent:
            return
        found = self.addresses if self.code == NOERROR and kind == 1 else []
        # A response (QR), recursion desired and available; the name by a pointer to the question.
        head = data[:2] + struct.pack("!HHHHH", 0x8180 | self.code, 1, len(found), 0, 0)
        records = b"".join(
            struct.pack("!HHHIH", 0xC00C, 1, 1, 1, 4) + bytes(map(int, address.split("."))) for address in found
        )
        self._transport.sendto(head + question + records, source)
