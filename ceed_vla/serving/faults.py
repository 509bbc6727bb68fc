"""What can go wrong with a server, as its clients see it."""

from __future__ import annotations

from ceed_vla.errors import CeedVLAError

LOST = "server_lost"  # it cannot be reached, or the connection has ended
SILENT = "server_silent"  # no answer in time
FOREIGN = "server_foreign"  # an answer that does not belong to the request, or breaks the contract
REFUSED = "server_refused"  # the server has refused the request
CHANGED = "server_changed"  # the server serves another policy than before


class ServerError(CeedVLAError):
    """The server cannot be reached, has refused a request, or has answered what it must not.

    Attributes:
        code: One of the codes above, or a code of `ceed_vla.serving.predictor_types.Response`,
            which the server has told.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
