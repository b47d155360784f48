"""Features to ids and vectors, and back."""
