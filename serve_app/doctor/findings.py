"""Findings that several checks have."""

from __future__ import annotations

from serve_app.doctor.facts import Finding, Level


def unaligned_chunks(what: str, block_size: int) -> Finding:
    """LMCache's chunk size is no multiple of the block size, in tokens."""
    return Finding(
        "lmcache",
        Level.ERROR,
        f"{what} is no multiple of the block size {block_size}",
        "LMCache's chunks are not whole blocks",
        "use a chunk size that is a multiple of the engines' block size",
    )


def lora_behind_lmcache(what: str) -> Finding:
    """An engine with LoRA adapters uses LMCache."""
    return Finding(
        "lmcache",
        Level.ERROR,
        f"{what} has LoRA adapters behind LMCache",
        "LMCache does not tell adapters apart: an adapter's blocks are taken for the base model's",
        "serve adapters without LMCache",
    )
