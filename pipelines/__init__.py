"""Energy-based out-of-distribution detection with vision-language models.

The map, from the top down; imports point down only (import-linter proves it):

    experiments speed       figures of the docs; benchmarks of the project's own speed
    pipeline run settings   all stages in order; one run: configuration, name, manifests
    report                  the page, its tables and pictures
    predict                 a registered model judges images
    sweep                   settings chosen on validation data, with the evidence
    evaluate register       scores to figures; the chosen model into the registry
    fitted                  scores that are fitted to training features
    score                   every head judges every image, scores by name
    finetune                features to trained heads: the loop, its state, Ray Train workers
    embed                   images to features, once per content address
    methods heads           plug-ins, one file each: what trains, and what classifies
    backbones store         what encodes images and texts; MLflow, leases, locks, moved storages
    data compute            sources, benchmarks, schemas, storage; Ray's cluster
    config plots records    words to frozen sections; how pictures look; what stages hand over;
    code_digest             which code can decide a result
    ood                     the maths alone: scores, losses, densities, metrics, statistics

A stage's pydantic section lives beside its code, and every command reads it first. So Ray, MLflow,
open_clip, pandas and matplotlib are imported by the functions that use them.
"""
