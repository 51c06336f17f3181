"""What the extra train brings: that it is there, and which loggers its Trainer finds."""

from __future__ import annotations

from collections.abc import Sequence

from mllama.wording import listed, quoted


def require_trainer() -> None:
    """Raises: ModuleNotFoundError that says how to get the trainer."""
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs {error.name}: pip install 'mllama-kernels[train]'"
        ) from None


def check_report_to(names: Sequence[str]) -> None:
    """Raises: ValueError for a logger that `transformers` does not know or that is not installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    there = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report-to must be one of {known}; got {quoted(name)}")
        if name not in there:
            raise ValueError(
                f"--report-to {name}: it is not installed (there is: {listed(there) or 'none'})"
            )
