"""Somebody who opens connections and asks for nothing: `python -m tests.half_open PORT CONNECTIONS SECONDS`.

Each connection is silent, or sends half a head, half a body, or a head drop by drop; where it is cut, it comes again.
Prints a line once all are open, and at the end how often they were cut.
"""

from __future__ import annotations

import asyncio
import sys
import time

HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SENT = (b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", HEAD + b"X: ")


class Attack:
    """Keeps connections open for a time. open, cut: how many are, and were"""

    def __init__(self, port: int, until: float) -> None:
        self.port, self.until = port, until
        self.open = self.cut = 0

    async def hold(self, number: int) -> None:
        """Keep one open."""
        while time.monotonic() < self.until:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.open += 1
            try:
                writer.write(SENT[number % 4])
                while time.monotonic() < self.until:
                    try:
                        if await asyncio.wait_for(reader.read(100), 1.0) == b"":
                            break
                    except TimeoutError:
                        writer.write(b"x" if number % 4 == 3 else b"")
            except OSError:
                pass
            finally:
                self.open -= 1
                self.cut += 1
                writer.close()
            await asyncio.sleep(0.2)


async def main(port: int, count: int, seconds: float) -> None:
    attack = Attack(port, time.monotonic() + seconds)
    holding = [asyncio.create_task(attack.hold(number)) for number in range(count)]
    while attack.open < count * 0.95:
        await asyncio.sleep(0.05)
    print(attack.open, flush=True)
    await asyncio.gather(*holding)
    print(attack.cut, flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
