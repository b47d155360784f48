"""Our format, and one key map per upstream format."""
