"""Images from files, photographs that come with packages, rendered scenes."""
