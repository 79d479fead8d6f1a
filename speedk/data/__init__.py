"""Real data: what there is, reading it, and normalising it."""

from speedk.data.catalogue import CATALOGUE, Entry, entry, names
from speedk.data.load import load
from speedk.data.normaliser import ChannelNormaliser, Normaliser, from_description
from speedk.data.part import storable
from speedk.data.real import RealData, Subset, listed
from speedk.data.zca import ZcaNormaliser

__all__ = ["CATALOGUE", "ChannelNormaliser", "Entry", "Normaliser", "RealData", "Subset", "ZcaNormaliser", "entry",
           "from_description", "listed", "load", "names", "storable"]
