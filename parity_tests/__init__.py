"""What makes ``reference`` and ``fast`` twins: a test file a stem, and the rule by which results are compared."""
