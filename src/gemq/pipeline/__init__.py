"""Jobs: the order of the stages, their files, resumption, and the checks before anything is computed."""
