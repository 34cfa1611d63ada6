"""The allocation program: costs of every matrix at every width, the solver, and the checks of what it chose."""
