"""What changes with experience: predictions, bucket limits, the safety share."""

from odma_service.learning.calibration import Source
from odma_service.learning.foresight import Foreseen, Model, Question
from odma_service.learning.learner import ClassCoverage, Learner, predictions_of
from odma_service.learning.observer import Change, Observer
from odma_service.learning.recalibration import LimitsReport, RecalibrationReport

__all__ = [
    "Change",
    "ClassCoverage",
    "Foreseen",
    "Learner",
    "LimitsReport",
    "Model",
    "Observer",
    "Question",
    "RecalibrationReport",
    "Source",
    "predictions_of",
]
