"""A VMM's side of KVM, thin: a virtual machine, its vCPUs, and doorbells and interrupts by eventfd."""
