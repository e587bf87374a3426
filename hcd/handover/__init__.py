"""Sessions that survive a restart of hcd: kept in the service manager's fd store, taken up again by the next process.

Theory of operation (systemd's "File Descriptor Store"; sd_notify(3), FDSTORE=1).

The manager keeps duplicates of descriptors for a service and hands them to its next main process, beside the listening
sockets. What one session needs to go on is stored there all the time, not only at the end: the connection to the front
end, its guest memory, the eventfds of its rings, the in-flight region, and a *state file*, a memfd with all the rest.
So an orderly end, a crash and kill -9 are recovered from in the same way, and the front end sees a pause.

* ``fdstore``     what the manager keeps, one entry for each open file
* ``statefile``   the memfd: a version, a checksum, two slots that are written in turn, and a mark "busy"
* ``record``      what is written into it
* ``keeper``      keeps the store and the state file of one session up to date
* ``keeping``     what a session does with it around each message
* ``recovery``    reads what an earlier process left, and says which of it can be gone on with
* ``resume``      sets such a session up again

Where a ring stands and what is in flight on it is in the in-flight region; hcd makes one of its own for a front end
that gives it none.

The order of things around one message makes it safe: busy is set before the message leaves the socket; its descriptors
go to the store, and the manager has confirmed them (BARRIER=1), before the new state is written; the state is written
before the answer leaves; then busy is cleared. A process that dies while busy is set may or may not have answered. That
cannot be told afterwards, so such a session ends: the connection is closed, and the front end connects again if it
does that. Descriptors that the new state does not name are removed from the store after it is written.
"""
