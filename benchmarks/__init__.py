"""Programs that measure the library against its peers; each appends to results/."""
