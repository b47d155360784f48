"""Training objectives, one file each; `train.config.OBJECTIVES` is the table of their names."""
