"""Programs that measure the library against its peers; with `--record` they keep what they measure in results/."""
