"""The configuration of a run: `words` checks its keys without plug-ins, `config` all of it."""
