"""Source models: their files, the structure of their layers and experts, and replay layer by layer."""
