"""What a finished job leaves for readers: the report page, the model card and pictures. Must not import torch."""
