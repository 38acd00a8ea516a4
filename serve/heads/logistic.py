"""Softmax regression by L-BFGS.

Shapes: N vectors, D dimensions, C classes, E = D + 1: a row of weights and its bias.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import log_softmax  # type: ignore[import-untyped]

Reals = NDArray[np.float64]
_MAX_ITERATIONS = 200


def logistic_regression(
    x_ND: NDArray[np.float32], y_N: NDArray[np.int64], weight_N: Reals, weight_decay: float, start_CE: Reals
) -> Reals:
    """What minimises `loss_and_gradient`, found from `start_CE`."""
    dim = x_ND.shape[1]
    scale_E = np.append(np.full(dim, dim**0.5), 1.0)  # entries of unit vectors are about 1 / sqrt(D): all slopes alike

    def objective(flat: Reals) -> tuple[float, Reals]:
        loss, slope_CE = loss_and_gradient(flat.reshape(start_CE.shape) * scale_E, x_ND, y_N, weight_N, weight_decay)
        return loss, (slope_CE * scale_E).ravel()

    options = {"maxiter": _MAX_ITERATIONS}
    found = minimize(objective, (start_CE / scale_E).ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x.reshape(start_CE.shape) * scale_E)


def loss_and_gradient(
    theta_CE: Reals, x_ND: NDArray[np.float32], y_N: NDArray[np.int64], weight_N: Reals, weight_decay: float
) -> tuple[float, Reals]:
    """Mean cross entropy, each vector by its weight, + weight_decay / 2 * |W|^2 / D; and its gradient (C, E).

    The mean is over the sum of the weights: a vector of weight 0 is not there.
    """
    w_CD, rows, share_N = theta_CE[:, :-1], np.arange(len(x_ND)), weight_N / weight_N.sum()
    log_p_NC = log_softmax(logits(theta_CE, x_ND), axis=1)
    decay = weight_decay / x_ND.shape[1]
    loss = decay / 2 * np.square(w_CD).sum() - share_N @ log_p_NC[rows, y_N]
    error_NC = np.exp(log_p_NC)
    error_NC[rows, y_N] -= 1
    error_NC *= share_N[:, None]
    slope_CD = error_NC.T.astype(np.float32) @ x_ND + decay * w_CD
    return float(loss), np.column_stack([slope_CD, error_NC.sum(0)])


def logits(theta_CE: Reals, x_ND: NDArray[np.float32]) -> Reals:
    """(N, C); the product in float32, as it is served."""
    return np.asarray(x_ND @ theta_CE[:, :-1].T.astype(np.float32) + theta_CE[:, -1])
