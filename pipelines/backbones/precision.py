"""`backbone.precision=auto`: bfloat16 where it was checked and the hardware computes in it."""

from __future__ import annotations

from pipelines.backbones.description import BackboneConfig
from pipelines.config import UserError


def settle(config: BackboneConfig, device: str) -> BackboneConfig:
    """The same backbone with a precision of its own in the place of `auto`.

    Args:
        config: a precision that is not `auto` stays as it is.
        device: where the tower will run, "cpu" or "cuda".

    Raises:
        UserError: where the card has to be asked and this machine has none.
    """
    if config.precision != "auto":
        return config
    chosen = "bf16" if config.bf16_checked and has_bfloat16(device, config.name) else "fp32"
    return config.model_copy(update={"precision": chosen})


def has_bfloat16(device: str, backbone: str) -> bool:
    """Whether the hardware of this machine multiplies bfloat16 itself, rather than by emulation.

    Args:
        device: "cpu" or "cuda".
        backbone: its name, for the message.

    Raises:
        UserError: for "cuda" on a machine without a card.
    """
    import torch  # here: only `auto` has to wait for it

    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    if not torch.cuda.is_available():
        raise UserError(
            f"backbone {backbone}: precision=auto asks the card of this machine, which has none; "
            "backbone.precision=bf16 or fp32 decides for the machines with cards"
        )
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
