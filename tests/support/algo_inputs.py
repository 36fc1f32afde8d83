"""Fixed inputs of the tests that compare with numbers recorded from the published PyTorch code."""

import numpy as np

X = np.float32([[[[0.3, -1.2], [0.8, 0.1]]], [[[1.5, -0.4], [-0.9, 0.6]]]])
V = np.float32([[[[-0.5, 0.7], [0.2, -1.1]]], [[[0.4, 0.9], [-0.3, 1.3]]]])
NOISE = np.float32([[[[0.25, -0.75], [1.1, -0.35]]], [[[-1.4, 0.05], [0.65, -0.2]]]])
S = np.float32([0.5, 0.75])
T = np.float32([0.8, 0.9])
