"""Real guests for the demo and for the tests: Debian kernels, an initramfs, QEMU, user-mode Linux, testpmd.

Everything here is the *other* side of the doorbell. A guest prints lines ``HCD: key=value`` on its console
(:mod:`hcd.demo.console` parses them); what it does in between is a shell script (:mod:`hcd.demo.jobs`).
"""
