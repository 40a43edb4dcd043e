"""What a function says when it refuses its input."""

import pytest

from utils.errors import InputError


def refusal(call, *args, **kwargs) -> str:
    """The one line of the InputError that the call raises."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
