"""Vector fields for the tests of solvers."""

from torch import nn


class Function(nn.Module):
    """A field given by a function of (t, h), which notes the times it is asked at."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function, self.times = function, []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, t, h):
        assert isinstance(t, float), "a fixed type: nothing to synchronize on a GPU"
        self.times.append(t)
        return self.function(t, h)
