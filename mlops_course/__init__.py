"""The MLOps course's system: from raw flights to a registered, scored and monitored model."""

__version__ = "0.1.0"
