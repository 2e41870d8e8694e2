"""Stages: the verbs of a run, between a run file and folders of results."""

from bopito_inverse.stages.check import inspect
from bopito_inverse.stages.folder import Job
from bopito_inverse.stages.verbs import fit, needed, reweight, sample, simulate, train

__all__ = ["Job", "fit", "inspect", "needed", "reweight", "sample", "simulate", "train"]
