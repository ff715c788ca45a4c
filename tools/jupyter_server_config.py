"""Cleans each notebook of this project when Jupyter saves it. `make hooks` copies this file into .venv."""


def clean_when_saving(**kwargs: object) -> None:
    """Take counters and machine details out of the notebook about to be saved."""
    from nbdev.clean import clean_jupyter

    clean_jupyter(**kwargs)


c.ContentsManager.pre_save_hook = clean_when_saving  # type: ignore[name-defined]  # noqa: F821
