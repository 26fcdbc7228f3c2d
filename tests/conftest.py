"""One thread: small tensors gain nothing from more, and a busy machine makes two 60 to 200 times slower."""

import torch

torch.set_num_threads(1)
