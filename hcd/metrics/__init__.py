"""The metrics of hcd: their names in one table, the cold families, and the server of /metrics."""
