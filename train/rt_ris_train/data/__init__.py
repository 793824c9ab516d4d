"""Data sets: the reader of RefCOCO's format, and scenes made for training and tests."""

from rt_ris_train.data.refcoco import Ref, RefDataset, Sentence

__all__ = ["Ref", "RefDataset", "Sentence"]
