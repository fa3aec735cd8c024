"""Learning: predictions, bucket limits and the safety share change with experience."""

from odma_service.learning.calibration import Source
from odma_service.learning.forecast import Forecast, Model, Question
from odma_service.learning.learner import ClassCoverage, Learner, predictions_of
from odma_service.learning.observer import Change, Observer
from odma_service.learning.recalibration import LimitsReport, RecalibrationReport

__all__ = [
    "Change",
    "ClassCoverage",
    "Forecast",
    "Learner",
    "LimitsReport",
    "Model",
    "Observer",
    "Question",
    "RecalibrationReport",
    "Source",
    "predictions_of",
]
