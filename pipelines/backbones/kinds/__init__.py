"""Kinds of backbones, one file a kind: each ends in `PLUGIN = BackboneKind(...)`."""
