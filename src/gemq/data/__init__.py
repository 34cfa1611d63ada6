"""Windows of tokens: from texts, from data sets, and written by the model itself."""
