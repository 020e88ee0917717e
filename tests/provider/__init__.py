"""A provider on loopback: it says what a test scripts, over real HTTP, and keeps its own books."""

from .script import Answer, Call
from .server import Bill, Provider, Request

__all__ = ["Answer", "Bill", "Call", "Provider", "Request"]
