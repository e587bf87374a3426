"""Names for what the log says, that stay the same when its words change: the journal's field MESSAGE_ID.

The key is the text as it stands in the code, before its arguments are put in. A test finds each of them there.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MESSAGE_IDS"]

MESSAGE_IDS: Mapping[str, str] = {
    "ready: %s": "3c549a6346eb46f7af8e22d1bccb50a3",
    "reloaded: %s": "599f941aa1cc41c18d588b5fbae5ffb7",
    "not reloaded, all is as before: %s": "575185a0d92a49f3bfa81b1f610dd961",
    "front end connected (pid %s)": "27fd57e6279942b4b05c00a2c504fbb1",
    "front end disconnected": "0e8d7721f052432f982542d19ad27b06",
    "the front end (pid %s) broke the protocol: %s; its connection ends": "fac23a2607124377a4ba32e9b8477366",
    "queue %d: %s; the driver broke its ring, no more requests are taken "
    "from it until it is set up again": "b1a26ff5cc184bfda7089e42e3259215",
    "queue %d: a request has been in flight for %.1f s, longer than stuck_after "
    "(%g s)": "7fb963f64ef7493b85334faf94b087b0",
    "queue %d: no request is stuck any more; one was in flight for %.1f s at least": "b3c1dcb5bc4c4c2687788a50571da4ab",
}
