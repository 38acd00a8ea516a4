"""A threshold file as the tests want it."""

from serve.identity.calibration import Calibration, Measured, Point


def measured(rate=0.01, low=0.0, high=0.05, probes=400, identities=100):
    return Measured(rate=rate, low=low, high=high, probes=probes, identities=identities)


def calibration(**changes):
    fields = {
        "format": "simclr-threshold-1",
        "encoder_id": "0123456789abcdef",
        "metric": "cosine",
        "asked_fpir": 0.01,
        "threshold": 0.7,
        "slope": 20.0,
        "intercept": -12.0,
        "identities": 50,
        "where": "",
        "tracks": False,
        "held_out": False,
        "fpir": measured(),
        "tpir": measured(rate=0.8, high=0.9),
        "curve": (Point(threshold=0.7, fpir=0.01, tpir=0.8),),
    }
    return Calibration(**fields | changes)
