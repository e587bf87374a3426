"""hcd: devices outside QEMU, and what every ring of their doorbells costs, by its path."""
