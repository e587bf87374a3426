"""The control socket: one snapshot of the daemon for all views of it, and the commands that change something.

* ``settings``: where the socket is and who may use it, for the daemon and for whoever looks for it.
* ``protocol``: the lines that go over it, without a socket.
* ``snapshot``: the shape of a snapshot; ``collect`` takes one from a running daemon.
* ``server``: the daemon's end; ``calls`` is what it can be asked; ``trace`` what it tells live.
* ``client``: the other end; ``cli`` the commands that are built on it, with the views of :mod:`hcd.views`.
"""
