"""What older torch versions cannot do, as marks of the tests that need it; of those that `make versions` runs."""

import pytest
import torch


def needs_torch(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip the test with older torch versions, which fail for this reason."""
    return pytest.mark.skipif(torch.__version__ < (major, minor), reason=f"torch before {major}.{minor} {reason}")
