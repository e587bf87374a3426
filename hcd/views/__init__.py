"""Views of a snapshot (:mod:`hcd.control.snapshot`) for people: pure functions that return lines of text."""
