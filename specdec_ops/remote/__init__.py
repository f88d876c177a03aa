"""Speculative decoding between a client that drafts and a server that verifies, which may lose each other.

Server      verifies what clients draft, in common rounds of one engine
Client      drafts, asks the server, and goes on alone while it is gone
Limits      what a server allows
Link, Cut   a line with round trips, jitter, losses and cuts, for tests and measurements
"""

from .answer import Piece as Piece
from .answer import RemoteResult as RemoteResult
from .answer import RemoteStats as RemoteStats
from .decoding import Client as Client
from .limits import Limits as Limits
from .line import RemoteError as RemoteError
from .link import Cut as Cut
from .link import Link as Link
from .service import Server as Server
