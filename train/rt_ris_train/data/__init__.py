"""Data sets: readers of RefCOCO's format and PhraseCut's, and scenes that are made."""

from rt_ris_train.data.opening import TrainingData, open_dataset, open_training
from rt_ris_train.data.refcoco import Ref, RefDataset, Sentence

__all__ = ["Ref", "RefDataset", "Sentence", "TrainingData", "open_dataset", "open_training"]
