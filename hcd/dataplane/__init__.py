"""The compiled data plane: guest memory, virtqueues, requests, statistics and the reactor.

Nothing here imports trio or prometheus_client. Rings and their statistics belong to one thread each.
"""
