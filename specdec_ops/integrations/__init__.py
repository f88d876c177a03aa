"""Other frameworks: their models in our engine, our ops in their loops. Each needs its own extra."""
