"""Every score that is fitted to training features, by name: what callers and tests iterate over."""

from pipelines.ood.density import (
    SSD,
    GaussianMixture,
    KLMatching,
    Mahalanobis,
    RelativeMahalanobis,
    ViM,
)
from pipelines.ood.input_steps import ODIN
from pipelines.ood.layer_ensemble import LayerEnsemble
from pipelines.ood.linear_layer import DICE, FDBD, VRA, AshB, AshP, AshS, NNGuide, ReAct, Scale
from pipelines.ood.nearest_neighbours import KNN
from pipelines.ood.records import FittedScore
from pipelines.ood.table import Table

_GAUSSIAN = ("features", "labels")
_OF_LAYER = ("activations", "weight")
FITTED_SCORES: Table[FittedScore] = Table(
    {
        "mahalanobis": FittedScore(Mahalanobis, _GAUSSIAN, "features"),
        "ssd": FittedScore(SSD, _GAUSSIAN, "features"),
        "relative_mahalanobis": FittedScore(RelativeMahalanobis, _GAUSSIAN, "features"),
        "knn": FittedScore(KNN, ("features",), "features"),
        "gaussian_mixture": FittedScore(GaussianMixture, _GAUSSIAN, "features"),
        "vim": FittedScore(ViM, ("features", "weight"), "features"),
        "kl_matching": FittedScore(KLMatching, ("logits",), "logits"),
        "react": FittedScore(ReAct, _OF_LAYER, "activations"),
        "vra": FittedScore(VRA, _OF_LAYER, "activations"),
        "dice": FittedScore(DICE, _OF_LAYER, "activations"),
        "ash_p": FittedScore(AshP, ("weight",), "activations"),
        "ash_b": FittedScore(AshB, ("weight",), "activations"),
        "ash_s": FittedScore(AshS, ("weight",), "activations"),
        "scale": FittedScore(Scale, ("weight",), "activations"),
        "nnguide": FittedScore(NNGuide, _OF_LAYER, "activations"),
        "odin": FittedScore(
            ODIN, ("weight",), "perturbed_features", {"tau": 1000.0, "eps": 0.0014}
        ),
        "perturbed_mahalanobis": FittedScore(
            Mahalanobis, _GAUSSIAN, "perturbed_features", {"eps": 0.0014}
        ),
        "layer_mahalanobis": FittedScore(
            LayerEnsemble, ("layers", "labels", "layer_sizes"), "layers"
        ),
        "fdbd": FittedScore(FDBD, _OF_LAYER, "activations"),
    }
)
