"""The MLOps course's system: from raw data to a registered, scored and monitored model."""

__version__ = "1.0.0"
