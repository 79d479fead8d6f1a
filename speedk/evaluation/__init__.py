"""Evaluation: what a network learns from a small set of images, measured on the real test set."""

from speedk.evaluation.continual import ContinualReport, continual
from speedk.evaluation.evaluate import evaluate
from speedk.evaluation.report import NetworkResult, Report
from speedk.evaluation.sources import Source, real_images, whole

__all__ = ["ContinualReport", "NetworkResult", "Report", "Source", "continual", "evaluate", "real_images", "whole"]
