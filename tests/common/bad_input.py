"""What tests of bad input share: changes of good arguments, and the check of the error."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Change = Callable[[dict[str, Any]], None]
TYPE = (TypeError,)
VALUE = (ValueError,)
EITHER = (TypeError, ValueError)
CPU = torch.device("cpu")


def put(name: str, value: Any) -> Change:
    return lambda arguments: arguments.__setitem__(name, value)


def alter(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda arguments: arguments.__setitem__(name, function(arguments[name]))


def assert_refused(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    change: Change,
    named: str,
    exceptions: tuple[type[Exception], ...],
) -> None:
    """With ``change`` a good call fails with one of ``exceptions``, whose message has one of ``named`` (a|b)."""
    call(**arguments)
    change(arguments)
    with pytest.raises(exceptions) as info:
        call(**arguments)
    assert type(info.value) in (TypeError, ValueError, IndexError)
    assert re.search(rf"\b({named})\b", str(info.value)), f"does not name {named}: {info.value}"
