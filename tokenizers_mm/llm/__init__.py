"""The bridge to language models; it programs against models/base.py only."""
