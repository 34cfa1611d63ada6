"""Transformers models as gemq sees them: where they come from, where their experts are, how layers are replayed."""
