"""A vhost-user front end and the driver's side of virtqueues, in plain Python.

Tests, the demo, the load generators and plug-in authors drive devices with it. It is synchronous: any
thread may own a :class:`~hcd.frontend.client.Frontend`, and nothing here imports trio or the daemon.
"""
