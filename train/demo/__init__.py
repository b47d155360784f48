"""The demo: fixed work on built-in images that shows all that the library does."""
