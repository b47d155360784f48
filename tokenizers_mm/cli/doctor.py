"""`tokenizers-mm doctor`."""

import argparse

SUMMARY = "Versions, device, kernels, and what is missing."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add nothing: the verb has no arguments."""


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    from tokenizers_mm import doctor

    print("\n".join(doctor.report()))
