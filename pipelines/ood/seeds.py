"""Where random numbers begin: the seed of each purpose, and generators of their own."""

import hashlib

import torch


def stream(seed: int, purpose: str) -> int:
    """A seed for each purpose, so that no two of a run's random streams are the same.

    Args:
        seed: of the run, >= 0.
        purpose: what the numbers are for, in words.

    Returns:
        32 bits, from a SHA-256 of both.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:4], "big")


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that nothing else draws from; on the CPU it is the same on every machine."""
    return torch.Generator(device).manual_seed(seed)
