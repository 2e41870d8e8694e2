"""Models: networks, scores, their training and their files."""

from bopito_inverse.models.scores import BoPITOScore, DynamicScore, EquilibriumScore, ITOScore

__all__ = ["BoPITOScore", "DynamicScore", "EquilibriumScore", "ITOScore"]
