"""Loads data and divides it among clients; the result is a `FederatedData`, the data of a run."""

from fedpress.data.dataset import FederatedData
from fedpress.data.load import load
from fedpress.data.preparation import Preparation
from fedpress.data.prepare import prepare
from fedpress.data.settings import DataSettings

__all__ = ["DataSettings", "FederatedData", "Preparation", "load", "prepare"]
