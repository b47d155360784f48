"""Networks and terms that exist for training only."""
