import torch

from bopito_inverse.observables import Correlation
from bopito_inverse.observables.features import FEATURES


def test_features_are_what_their_names_say() -> None:
    x = torch.tensor([[-2.0], [0.0], [0.5]])
    expected = {"x": [-2.0, 0.0, 0.5], "x^2": [4.0, 0.0, 0.25], "x>0": [0.0, 0.0, 1.0]}
    assert {name: f(x)[:, 0].tolist() for name, f in FEATURES.items()} == expected


def test_features_are_observables_of_a_correlation() -> None:
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    for feature in FEATURES.values():
        value = Correlation(feature, normalization="variance")(x, torch.stack([x, -x]))
        assert abs(float(value[0]) - 1) < 1e-12
    assert float(Correlation(FEATURES["x^2"], normalization="variance")(x, -x[None])) > 1 - 1e-12
    assert float(Correlation(FEATURES["x>0"], normalization="variance")(x, -x[None])) < -1 + 1e-12
