"""What every test runs under."""

import torch

# The nets of the tests are tiny: a second thread costs more than it does, and many times more on a busy machine.
torch.set_num_threads(1)
