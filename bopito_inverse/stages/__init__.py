"""Stages: the verbs of a run, between a run file and folders of results."""

from bopito_inverse.stages.folder import Job
from bopito_inverse.stages.verbs import fit, reweight, sample, simulate, train

__all__ = ["Job", "fit", "reweight", "sample", "simulate", "train"]
