"""Evaluation: what a network learns from a small set of images, measured on the real test set."""

from speedk.evaluation.evaluate import evaluate
from speedk.evaluation.report import NetworkResult, Report
from speedk.evaluation.sources import Source, real_images, whole

__all__ = ["NetworkResult", "Report", "Source", "evaluate", "real_images", "whole"]
