"""Vectors to images and features."""
