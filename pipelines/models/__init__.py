"""Backbones, prompts and heads."""
