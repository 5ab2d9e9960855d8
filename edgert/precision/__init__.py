"""Which format each matrix of a model is stored in, so that a predicted loss of quality buys the most: pure arithmetic.

    formats   what a matrix can be stored in: bytes, what it fits, what suits an NPU
    layers    a model's matrices, and the formats they may take, each with a predicted loss; the model with a mix
    problem   what is asked and what is answered
    hull      one option for each layer: Lagrangian choices, their convex hull, exchanges up to a budget. Arrays only
    shares    what each layer takes in each format and place: the scheduler's prices of blocks, shared out
    joint     plans that may be the best with some mix, and mixes for each of them
    solve     the questions: `solve` for a price of the loss, `fill` for a budget, `front` for all of it; `random_mixes`

Losses come from outside and are taken to add up. Whether they do is for those to measure who predicted them
(`random_mixes` gives them mixes to do so with), and the same holds for the quality of what is chosen.
"""

from edgert.precision.formats import FORMATS, Format, named
from edgert.precision.layers import Layer, Mix, Option, bits_per_weight, graph_with, mix_bytes, mix_loss, recipe_only
from edgert.precision.problem import Problem, Solution
from edgert.precision.solve import fill, front, random_mixes, solve

__all__ = [
    "FORMATS", "Format", "Layer", "Mix", "Option", "Problem", "Solution", "bits_per_weight", "fill", "front",
    "graph_with", "mix_bytes", "mix_loss", "named", "random_mixes", "recipe_only", "solve",
]  # fmt: skip
