"""What an evaluation says of its runs."""

import math

from speedk.evaluation.report import NetworkResult


def test_the_deviation_is_the_populations():
    result = NetworkResult("mlp", 1, [0, 1, 2], [1.0, 2.0, 4.0])
    mean = (1 + 2 + 4) / 3
    assert math.isclose(result.mean, mean)
    assert math.isclose(result.std, math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2) / 3))
