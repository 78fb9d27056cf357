"""Where a fitted score lies below `cache/fitted/`: a digest of everything that decides it."""

from __future__ import annotations

from pipelines.config import digest
from pipelines.fitted.plan import FitData, ScoreFit
from pipelines.fitted.record import fit_code
from pipelines.methods.energy_models import density_fields
from pipelines.score import by_name as scoring


def address(fit: ScoreFit, data: FitData) -> str:
    """The address of the record that `fit` gives of `data`."""
    return digest(
        {
            "score": fit.score,
            "params": dict(fit.params),
            "density": None if fit.density is None else density_fields(fit.density),
            "seed": fit.seed,
            "head": fit.head,
            "parts": part_addresses(fit, data),
            "data": data.address,
            "layers": data.layers_address if scoring.reads_layers([fit.score]) else None,
            "code": fit_code(fit.score).digest,
        }
    )


def part_addresses(fit: ScoreFit, data: FitData) -> dict[str, str]:
    """The addresses of the records of a sum's parts, by name."""
    return {part.score: address(part, data) for part in fit.parts}
