"""Scores, losses and energies as pure functions of tensors: torch, numpy, scikit-learn only.

`similarity` are cosines, `logits` are scaled; `energy` is LOW and `score` HIGH for in-distribution
(ID) samples; ID is the positive class; `is_ood = score < threshold`. The name `energy` here is the
score; free energy, margins and priors live in the module of that name
(`from pipelines.ood.energy import ...`).
"""

from pipelines.ood.density import (
    SSD,
    GaussianMixture,
    KLMatching,
    Mahalanobis,
    RelativeMahalanobis,
    ViM,
)
from pipelines.ood.energy import adjust_logits, free_energy, outlier_counts, prior, suggest_margins
from pipelines.ood.energy_correction import (
    EnergyCorrection,
    EnergySettings,
    FeatureEBM,
    correction_loss,
    sgld,
)
from pipelines.ood.fitted_scores import FITTED_SCORES
from pipelines.ood.input_steps import ODIN, DifferentiableScore, odin, odin_perturb, step_up
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
from pipelines.ood.metrics import (
    METRICS,
    Bounded,
    Metric,
    aupr_id,
    aupr_ood,
    aurc,
    auroc,
    bootstrap_interval,
    detection_error,
    expected_calibration_error,
    fpr_at_tpr,
    histogram_metrics,
    ood_metrics,
    paired_accuracy_interval,
    paired_delta_interval,
    threshold_at_tpr,
)
from pipelines.ood.nearest_neighbours import KNN
from pipelines.ood.records import FittedRecord, FittedScore, move, record_from_state, record_state
from pipelines.ood.resampling import Interval
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
)
from pipelines.ood.statistics import (
    ClassCounts,
    ClassStatistics,
    EnergyMoments,
    ScoreHistogram,
    merge_all,
)
from pipelines.ood.table import Entry

__all__ = [
    "FITTED_SCORES",
    "KNN",
    "LOSSES",
    "METRICS",
    "ODIN",
    "SCORES",
    "SSD",
    "Bounded",
    "ClassCounts",
    "ClassStatistics",
    "DifferentiableScore",
    "EnergyCorrection",
    "EnergyMoments",
    "EnergySettings",
    "Entry",
    "FeatureEBM",
    "FittedRecord",
    "FittedScore",
    "GaussianMixture",
    "Interval",
    "KLMatching",
    "Mahalanobis",
    "Metric",
    "RelativeMahalanobis",
    "ScoreHistogram",
    "ViM",
    "adjust_logits",
    "aupr_id",
    "aupr_ood",
    "aurc",
    "auroc",
    "balance_weight",
    "balanced_energy_margin",
    "bootstrap_interval",
    "combine",
    "correction_loss",
    "delta_energy",
    "delta_energy_bound",
    "delta_energy_grid",
    "detection_error",
    "energy",
    "energy_margin",
    "energy_single_margin",
    "expected_calibration_error",
    "fpr_at_tpr",
    "free_energy",
    "gen",
    "gl_mcm",
    "histogram_metrics",
    "masked_energy_change",
    "max_logit",
    "mcm",
    "merge_all",
    "move",
    "msp",
    "neg_entropy",
    "neg_label",
    "odin",
    "odin_perturb",
    "ood_metrics",
    "outlier_counts",
    "outlier_exposure",
    "paired_accuracy_interval",
    "paired_delta_interval",
    "prior",
    "record_from_state",
    "record_state",
    "sgld",
    "step_up",
    "suggest_margins",
    "threshold_at_tpr",
]
