"""Scores, losses and energies as pure functions of tensors: torch, numpy, scikit-learn only.

`similarity` are cosines, `logits` are scaled; `energy` is LOW and `score` HIGH for in-distribution
(ID) samples; ID is the positive class; `is_ood = score < threshold`. The name `energy` here is the
score; free energy, margins and priors live in the module of that name
(`from pipelines.ood.energy import ...`).
"""

from pipelines.ood.energy import (
    adjust_logits,
    free_energy,
    outlier_counts,
    prior,
    suggest_margins,
)
from pipelines.ood.losses import (
    LOSSES,
    balance_weight,
    balanced_energy_margin,
    delta_energy_bound,
    energy_margin,
    energy_single_margin,
    masked_energy_change,
    outlier_exposure,
)
from pipelines.ood.scores import (
    SCORES,
    combine,
    delta_energy,
    delta_energy_grid,
    energy,
    gen,
    gl_mcm,
    max_logit,
    mcm,
    msp,
    neg_entropy,
    neg_label,
    odin,
    odin_perturb,
)
from pipelines.ood.table import Entry

__all__ = [
    "LOSSES",
    "SCORES",
    "Entry",
    "adjust_logits",
    "balance_weight",
    "balanced_energy_margin",
    "combine",
    "delta_energy",
    "delta_energy_bound",
    "delta_energy_grid",
    "energy",
    "energy_margin",
    "energy_single_margin",
    "free_energy",
    "gen",
    "gl_mcm",
    "masked_energy_change",
    "max_logit",
    "mcm",
    "msp",
    "neg_entropy",
    "neg_label",
    "odin",
    "odin_perturb",
    "outlier_counts",
    "outlier_exposure",
    "prior",
    "suggest_margins",
]
