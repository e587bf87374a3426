"""The device types that come with hcd, written on the public API alone."""
