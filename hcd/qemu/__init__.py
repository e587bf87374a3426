"""How QEMU and libvirt are told of hcd's devices."""
