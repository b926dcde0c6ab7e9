"""Structure: cutting units and blocks out of a model, in its graph, its module and its saved form."""
