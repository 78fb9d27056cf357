"""Energy-based out-of-distribution detection with vision-language models.

The map, from the top down; imports point down only (import-linter proves it):

    pipeline run            all stages in order; one run: configuration, name, manifests
    embed sweep finetune score evaluate register    the stages, in the order they run
    predict registered_model detector               the finished model: images to verdicts
    prior fit fit_stage fitted_search               what is measured on training features
    trained_heads fitted_records                    heads and fitted scores, found by content
    report tracking figures speed                   tables, MLflow, pictures, benchmarks
    training posthoc scoring                        the training loop; scores by name
    methods models          fine-tuning methods, one file each; backbones and heads
    data                    sources of images, benchmarks, table schemas, storage
    config compute          words to frozen sections; Ray's workers
    ood                     the maths alone: scores, losses, densities, metrics, statistics
"""
