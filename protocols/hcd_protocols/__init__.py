"""Wire formats that hcd speaks, free of sockets and event loops: the standard library and construct,
nothing else.
"""
