"""``hcd doctor``: the usual reasons why a guest does not get its device.

Each module looks at one place (the host, the configuration, a socket, QEMU's command line, QEMU itself over QMP) and
returns findings. None of them changes anything.
"""
