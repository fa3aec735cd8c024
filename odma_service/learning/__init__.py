"""What changes with experience: predictions, bucket limits, the safety share."""

from odma_service.learning.learner import Learner
from odma_service.learning.observer import Change, Observer
from odma_service.learning.recalibration import LimitsReport, RecalibrationReport

__all__ = ["Change", "Learner", "LimitsReport", "Observer", "RecalibrationReport"]
