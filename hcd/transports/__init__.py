"""How hcd gets doorbells from a VMM: one module per transport."""
